//! What happened to the memory of all guests, as a picture.

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use plotters::prelude::*;
use vmbed::Usage;

/// One look, in MiB, and in steps a second.
struct Sample {
    seconds: f64,
    entitled: f64,
    backing: f64,
    loaned: f64,
    pressure: f64,
}

pub struct Plot {
    began: Instant,
    last: (Instant, u64),
    samples: Vec<Sample>,
}

impl Plot {
    pub fn new() -> Self {
        let now = Instant::now();
        Self { began: now, last: (now, 0), samples: Vec::new() }
    }

    /// `steps` is how many have been taken against pressure so far.
    pub fn look(&mut self, usage: &Usage, steps: u64) {
        let now = Instant::now();
        let (since, before) = std::mem::replace(&mut self.last, (now, steps));
        let mib = |bytes: vmbed::Bytes| bytes.get() as f64 / f64::from(1 << 20);
        self.samples.push(Sample {
            seconds: self.began.elapsed().as_secs_f64(),
            entitled: mib(usage.entitlement),
            backing: mib(usage.backing),
            loaned: mib(usage.loaned),
            pressure: steps.saturating_sub(before) as f64 / (now - since).as_secs_f64().max(1e-3),
        });
    }

    /// Draws it as SVG; `usable` is what the host has for guests, in MiB.
    pub fn write(&self, path: &Path, usable: f64) -> Result<(), Box<dyn Error>> {
        let last = self.samples.last().map_or(1.0, |s| s.seconds);
        let most = self.samples.iter().map(|s| s.entitled).fold(usable, f64::max) * 1.5;
        let busiest = self.samples.iter().map(|s| s.pressure).fold(1.0, f64::max) * 1.5;
        let root = SVGBackend::new(path, (900, 420)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .margin(12)
            .x_label_area_size(38)
            .y_label_area_size(56)
            .right_y_label_area_size(50)
            .build_cartesian_2d(0.0..last, 0.0..most)?
            .set_secondary_coord(0.0..last, 0.0..busiest);
        chart
            .configure_mesh()
            .x_desc("seconds")
            .y_desc("MiB")
            .light_line_style(WHITE)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.0}"))
            .draw()?;
        chart
            .configure_secondary_axes()
            .y_desc("steps a second")
            .y_label_formatter(&|y| format!("{y:.0}"))
            .draw()?;
        let waits = self.samples.iter().map(|s| (s.seconds, s.pressure));
        chart
            .draw_secondary_series(AreaSeries::new(waits, 0.0, RED.mix(0.25)))?
            .label("pressure: pages out, pauses and other steps against it")
            .legend(|(x, y)| Rectangle::new([(x, y - 4), (x + 18, y + 4)], RED.mix(0.25).filled()));
        let names = [
            ("entitlement: what guests may touch", BLACK),
            ("what the host has for guests", RGBColor(130, 130, 130)),
            ("backing: what exists of it", BLUE),
            ("loaned: in balloons", RGBColor(0, 140, 70)),
        ];
        for (i, (name, color)) in names.into_iter().enumerate() {
            let of = |s: &Sample| [s.entitled, usable, s.backing, s.loaned][i];
            let points = self.samples.iter().map(|s| (s.seconds, of(s)));
            chart
                .draw_series(LineSeries::new(points, color.stroke_width(2)))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .draw()?;
        root.present()?;
        Ok(())
    }
}
