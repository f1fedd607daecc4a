//! The VMs of this process, live: what each was promised, what is there of it, and what its vCPUs get. Guests that fill
//! memory and free it again, more than the machine has, are there to look at.
//!
//! ```text
//! cargo run --release --example top -- --kernel vmlinuz --initrd initrd.img --guests 6 --memory 320
//! ```
//! `q` or Ctrl-C ends it. With `--seconds N` and no terminal it prints the table as it goes along, and a summary.

#[path = "top/looks.rs"]
mod looks;
#[path = "top/plot.rs"]
mod plot;

use std::error::Error;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table};
use vmbed::{
    BalloonConfig, Bytes, EventKind, Host, HostConfig, LinuxBoot, ReclaimConfig, StopCause, Usage, Vm,
    VmConfig, VmMemory, VmState,
};

const USAGE: &str = "usage: top --kernel FILE --initrd FILE [--guests N] [--memory MIB] [--seconds N] [--plot FILE] [--looks FILE]
  --kernel, --initrd   a Debian kernel, and an initrd that runs what `vmbed.run=` says (tests/assets/busybox-initrd)
  --guests N           how many guests (default 6)
  --memory MIB         what each may have (default 320)
  --seconds N          how long; without it until `q`
  --plot FILE          at the end, an SVG of what was promised, what existed, and the pressure, over time
  --looks FILE         every look that the policy takes at the host, with what it does then";

/// What a guest does: fills much of its memory, frees it, rests; others do so at other times.
const SCRIPT: &str = "mkdir -p /mnt; mount -t tmpfs -o size=90% none /mnt; sleep REST; turns=0
while :; do dd if=/dev/zero of=/mnt/fill bs=1M count=FILL 2>/dev/null && turns=$((turns+1)); echo turns=$turns
sleep 4; rm -f /mnt/fill; echo 3 >/proc/sys/vm/drop_caches; sleep 8; done";

struct Arguments {
    kernel: PathBuf,
    initrd: PathBuf,
    guests: u32,
    memory: u64,
    seconds: Option<u64>,
    plot: Option<PathBuf>,
    looks: Option<PathBuf>,
}

fn arguments() -> Result<Arguments, String> {
    let (mut kernel, mut initrd) = (None, None);
    let (mut guests, mut memory, mut seconds, mut plot, mut looks) = (6, 320, None, None, None);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--help" {
            println!("{USAGE}");
            std::process::exit(0);
        }
        let value = words.next().ok_or_else(|| format!("{word} wants a value\n{USAGE}"))?;
        let number = || value.parse::<u64>().map_err(|_| format!("{word} wants a number, not {value:?}"));
        match word.as_str() {
            "--kernel" => kernel = Some(value.into()),
            "--initrd" => initrd = Some(value.into()),
            "--guests" => guests = number()?.clamp(1, 64) as u32,
            "--memory" => memory = number()?,
            "--seconds" => seconds = Some(number()?),
            "--plot" => plot = Some(value.into()),
            "--looks" => looks = Some(value.into()),
            _ => return Err(format!("{word} is not known\n{USAGE}")),
        }
    }
    let (Some(kernel), Some(initrd)) = (kernel, initrd) else { return Err(USAGE.to_owned()) };
    Ok(Arguments { kernel, initrd, guests, memory, seconds, plot, looks })
}

fn main() -> ExitCode {
    let done = arguments().and_then(|a| run(&a).map_err(|e| format!("top: {e}")));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// A guest, and what of it changes from one look to the next.
struct Guest {
    name: String,
    vm: Vm,
    memory: VmMemory,
    run: Duration,
    delay: Duration,
    /// Of one CPU, since the last look: running, and waiting for one.
    load: f64,
    steal: f64,
    steps: u64,
    most: Bytes,
}

impl Guest {
    fn look(&mut self, since: Duration) {
        self.memory = self.vm.memory();
        self.most = self.most.max(self.memory.backing);
        if let Ok(now) = self.vm.vcpu_statistics(0) {
            let share = |now: Duration, before: Duration| {
                now.saturating_sub(before).as_secs_f64() / since.as_secs_f64().max(1e-3)
            };
            (self.load, self.steal) = (share(now.run_time, self.run), share(now.run_delay, self.delay));
            (self.run, self.delay) = (now.run_time, now.run_delay);
        }
        while let Some(event) = self.vm.events().next_event() {
            self.steps += u64::from(matches!(event.kind, EventKind::MemoryPressure { .. }));
        }
    }

    /// How often it has filled its memory.
    fn turns(&self) -> u64 {
        let console = String::from_utf8_lossy(&self.vm.console_tail()).into_owned();
        let last = console.lines().rev().find_map(|line| line.trim().strip_prefix("turns=")?.parse().ok());
        last.unwrap_or(0)
    }

    fn state(&self) -> String {
        match self.vm.state() {
            VmState::Stopped(cause) => cause.to_string(),
            state => format!("{state:?}").to_lowercase(),
        }
    }

    fn cells(&self) -> [String; 10] {
        let (m, mib) = (&self.memory, |b: Bytes| format!("{}", b.get() >> 20));
        [
            self.name.clone(),
            self.state(),
            mib(m.max),
            mib(m.entitlement),
            mib(m.guarantee),
            mib(m.backing),
            mib(m.swapped),
            mib(m.loaned),
            format!("{}", m.overhead.get() >> 10),
            format!("{:3.0}% {:3.0}%", self.load * 100.0, self.steal * 100.0),
        ]
    }
}

const TITLES: [&str; 10] = [
    "name",
    "state",
    "max",
    "entitled",
    "guaranteed",
    "backing",
    "swapped",
    "loaned",
    "overhead KiB",
    "cpu  steal",
];
const WIDTHS: [u16; 10] = [8, 18, 5, 8, 10, 7, 7, 6, 12, 10];

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    arguments.looks.as_deref().map_or(Ok(()), looks::write_to)?;
    let mut shares = HostConfig::default();
    (shares.memory_ratio, shares.memory_reserved) = (8.0, Bytes::mib(64));
    let host = Host::open_with(shares)?;
    host.set_reclaim(Some(&reclaim(&host)))?;
    let mut guests: Vec<Guest> =
        (0..arguments.guests).map(|i| start(&host, arguments, i)).collect::<Result<_, _>>()?;
    let mut plot = plot::Plot::new();
    let began = Instant::now();
    let over = || arguments.seconds.is_some_and(|s| began.elapsed() >= Duration::from_secs(s));
    if std::io::stdout().is_terminal() {
        let mut terminal = ratatui::init();
        let drawn = live(&mut terminal, &host, &mut guests, &mut plot, over);
        ratatui::restore();
        drawn?;
    } else {
        let mut last = Instant::now();
        let mut turn = 0;
        while !over() {
            std::thread::sleep(Duration::from_secs(1));
            guests.iter_mut().for_each(|g| g.look(last.elapsed()));
            last = Instant::now();
            plot.look(&host.usage(), guests.iter().map(|g| g.steps).sum());
            turn += 1;
            if turn % 2 == 1 {
                continue;
            }
            println!("{}\n{}", plain(&guests), sums(&host.usage()));
        }
    }
    if let Some(path) = &arguments.plot {
        plot.write(path, host.usage().memory_usable.get() as f64 / f64::from(1 << 20))?;
    }
    summary(&guests, arguments);
    Ok(())
}

/// Thresholds for a small machine, as parts of it.
fn reclaim(host: &Host) -> ReclaimConfig {
    let all = host.usage().memory_usable.get();
    let mut config = ReclaimConfig::default();
    (config.balloon_below, config.page_out_below) = (Bytes(all / 4), Bytes(all / 6));
    (config.pause_below, config.stop_below) = (Bytes(all / 12), Bytes(all / 24));
    config.interval = Duration::from_millis(200);
    config
}

fn start(host: &Host, arguments: &Arguments, index: u32) -> vmbed::Result<Guest> {
    // Each has its turn: all at once would be more than the machine has.
    let script = SCRIPT
        .replace("REST", &(index * 10).to_string())
        .replace("FILL", &(arguments.memory * 2 / 5).to_string());
    let cmdline = format!("console=ttyS0 reboot=k panic=-1 quiet vmbed.run={}", base64(script.as_bytes()));
    let mut config =
        VmConfig::linux(LinuxBoot::new(&arguments.kernel).initrd(&arguments.initrd).cmdline(cmdline));
    config.name = format!("guest{index}");
    config.memory = Bytes::mib(arguments.memory);
    config.balloon = Some(BalloonConfig::default());
    config.promise.guarantee = Bytes::mib(64);
    config.promise.victim = Some(index.min(255) as u8);
    let name = config.name.clone();
    let vm = host.build(config)?;
    vm.start()?;
    let memory = vm.memory();
    let zero = Duration::ZERO;
    Ok(Guest { name, vm, memory, run: zero, delay: zero, load: 0.0, steal: 0.0, steps: 0, most: Bytes(0) })
}

/// Draws twice a second until `q`.
fn live(
    terminal: &mut ratatui::DefaultTerminal,
    host: &Host,
    guests: &mut [Guest],
    plot: &mut plot::Plot,
    over: impl Fn() -> bool,
) -> std::io::Result<()> {
    let mut last = Instant::now();
    while !over() {
        guests.iter_mut().for_each(|g| g.look(last.elapsed()));
        last = Instant::now();
        let usage = host.usage();
        plot.look(&usage, guests.iter().map(|g| g.steps).sum());
        terminal.draw(|frame| {
            let [table, below] =
                Layout::vertical([Constraint::Min(3), Constraint::Length(2)]).areas(frame.area());
            let rows = guests.iter().map(|g| {
                Row::new(g.cells().map(Cell::from).into_iter().chain([Cell::from(bar(&g.memory, 30))]))
            });
            let widths = WIDTHS.iter().map(|w| Constraint::Length(*w)).chain([Constraint::Min(30)]);
            let titles = Row::new(TITLES.into_iter().chain(["backing █  swapped ▒  of max"])).bold();
            frame.render_widget(Table::new(rows, widths).header(titles), table);
            frame.render_widget(Paragraph::new(sums(&usage)), below);
        })?;
        if event::poll(Duration::from_millis(500))?
            && let Event::Key(key) = event::read()?
            && (key.code == KeyCode::Char('q')
                || key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL))
        {
            break;
        }
    }
    Ok(())
}

/// What there is of a VM as a part of what it may have, `width` characters for all.
fn bar(memory: &VmMemory, width: u64) -> Line<'static> {
    let part = |b: Bytes| (b.get() * width).div_ceil(memory.max.get().max(1)) as usize;
    let (there, away) = (part(memory.resident), part(memory.swapped));
    let color = if memory.backing > memory.guarantee { Color::Yellow } else { Color::Green };
    let rest = (width as usize).saturating_sub(there + away);
    Line::from(vec![
        Span::from("█".repeat(there)).fg(color),
        Span::from("▒".repeat(away)).fg(Color::Red),
        Span::from("·".repeat(rest)).dim(),
    ])
}

fn plain(guests: &[Guest]) -> String {
    let line = |cells: [String; 10]| {
        let padded = cells.iter().zip(WIDTHS).map(|(cell, width)| format!("{cell:>0$}", usize::from(width)));
        padded.collect::<Vec<_>>().join(" ")
    };
    let rows = guests.iter().map(|g| line(g.cells()));
    [line(TITLES.map(str::to_owned))].into_iter().chain(rows).collect::<Vec<_>>().join("\n")
}

fn sums(usage: &Usage) -> String {
    format!(
        "{} VMs, {} promised at most; {} exist, {} charged by the kernel, {} of it nobody's; overhead {}; swap {}\n",
        usage.vms,
        usage.memory,
        usage.backing,
        usage.charged,
        usage.unattributed >> 20,
        usage.overhead,
        usage.swap
    )
}

/// What came of it; `demo: ok` where nobody was lost but those that might be, and everybody else got their turns.
fn summary(guests: &[Guest], arguments: &Arguments) {
    let mut good = true;
    println!("name     turns  most there  steps  state");
    for guest in guests {
        let (turns, state) = (guest.turns(), guest.vm.state());
        good &= match &state {
            VmState::Stopped(cause) => *cause == StopCause::MemoryPressure,
            _ => turns > 0,
        };
        let most = guest.most.get() >> 20;
        println!("{:8} {turns:5}  {most:6} MiB  {:5}  {}", guest.name, guest.steps, guest.state());
    }
    let promised = u64::from(arguments.guests) * arguments.memory;
    println!("{promised} MiB of guest memory in all");
    println!("demo: {}", if good { "ok" } else { "FAILED" });
}

/// RFC 4648, for the kernel's command line.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let chunk = |c: &[u8]| {
        let word = c.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - c.len()));
        let digit =
            |i: usize| if i <= c.len() { DIGITS[(word >> (18 - 6 * i) & 63) as usize] as char } else { '=' };
        [digit(0), digit(1), digit(2), digit(3)]
    };
    bytes.chunks(3).flat_map(chunk).collect()
}
