//! Every look that the policy takes at the host, and what it does then: from vmbed's log to a file.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;

struct Looks(Mutex<File>);

impl log::Log for Looks {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target() == "vmbed::host::reclaim"
    }

    fn log(&self, record: &log::Record<'_>) {
        let line = record.args().to_string();
        if let (true, Some(look), Ok(mut file)) =
            (self.enabled(record.metadata()), line.strip_prefix("look: "), self.0.lock())
        {
            let _ = writeln!(file, "{look}");
        }
    }

    fn flush(&self) {}
}

/// From now on, and until the program ends.
pub fn write_to(path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    log::set_logger(Box::leak(Box::new(Looks(Mutex::new(File::create(path)?)))))
        .map_err(|e| e.to_string())?;
    log::set_max_level(log::LevelFilter::Trace);
    Ok(())
}
