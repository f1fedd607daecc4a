//! What takes a machine of its own, which the lab is: a cgroup for the VM, a card that the kernel serves, a block device, memory of the pool of
//! huge pages.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use vmbed::{BackingKind, BalloonConfig, Bytes, CgroupConfig, DiskConfig, Host, NetConfig, Vhost};

use crate::driven::{FRAME, Far, SENT, SIZE};
use crate::guests::Op;
use crate::life::{FAR, Stage, aside, end_of, lock};
use crate::others::{end, ready};
use crate::sweep::{AFTER, HITS};
use crate::{GUEST, Kind, Swept, callers, disks, wire};

/// In the lab: what is swept outside, as `number:request:place`.
const KNOWN: &str = "VMBED_FAULT_KNOWN";

/// That, in the lab.
pub fn known() -> Option<Swept> {
    let known = std::env::var(KNOWN).ok()?;
    assert!(is_the_lab(), "{KNOWN} is for the lab alone");
    let mut swept = Swept::new();
    for triple in known.split(' ') {
        let numbers: Vec<u32> = triple.split(':').map(|number| number.parse().expect("a number")).collect();
        let kind = Kind { number: numbers[0], request: numbers[1] };
        swept.entry(kind).or_default().insert(numbers[2]);
    }
    Some(swept)
}

fn is_the_lab() -> bool {
    std::fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains("vmbed.lab=1"))
}

/// Runs this program in a lab, for what is not swept here.
pub fn in_a_lab(swept: &Swept) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fetched = Command::new(root.join("tests/assets/fetch")).status().expect("tests/assets/fetch");
    assert!(fetched.success(), "tests/assets/fetch: {fetched}");
    // It ends with this program.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM"]).arg(root.join("tests/lab/run"));
    let seconds = if crate::wants("all") { "7200" } else { "1200" };
    command.args(["--memory", "2G", "--timeout", seconds, "--attempts", "3", "--", "env"]);
    for name in [GUEST, callers::PLACES, disks::BELOW, "VMBED_FAULTS"] {
        command.args(std::env::var(name).ok().map(|value| format!("{name}={value}")));
    }
    let of = |(kind, from): (&Kind, &BTreeSet<u32>)| {
        from.iter().map(|place| format!("{}:{}:{place}", kind.number, kind.request)).collect::<Vec<_>>()
    };
    let known: Vec<_> = swept.iter().flat_map(of).collect();
    command.arg(format!("{KNOWN}={}", known.join(" ")));
    let output = command.arg(std::env::current_exe().unwrap()).output().expect("tests/lab/run");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let said = text(&output.stdout);
    for (word, those) in OUTCOMES {
        let line = said.lines().rev().find_map(|line| line.strip_prefix(word)).unwrap_or_default();
        lock(those).extend(line.split(' ').filter_map(|number| number.parse::<u32>().ok()));
    }
    assert!(output.status.success(), "{}: {said}{}", output.status, text(&output.stderr));
    println!("in the lab: {}", said.lines().rfind(|line| line.contains(" lives, ")).unwrap_or("nothing"));
}

const OUTCOMES: [(&str, &Mutex<BTreeSet<u32>>); 2] = [("places-hit ", &HITS), ("places-after ", &AFTER)];

/// Says outside what came of it.
pub fn report() {
    for (word, those) in OUTCOMES {
        let numbers: Vec<_> = lock(those).iter().map(u32::to_string).collect();
        println!("{word}{}", numbers.join(" "));
    }
}

const CARD: &str = "vnet9";

/// That of this process, by [`caged`]: several live at a time, and each takes the controller away. They go with the lab.
fn cgroup() -> String {
    format!("/sys/fs/cgroup/vmbed-faults-{}", std::process::id())
}

/// A child in a network namespace and in a cgroup of its own, with what there is but once for a machine.
pub fn caged(program: &Path) -> Command {
    const SCRIPT: &str = "set -e
        modprobe -a vhost_net loop
        mkdir /sys/fs/cgroup/vmbed-faults-$$
        echo +cpu >/sys/fs/cgroup/cgroup.subtree_control
        echo $$ >/sys/fs/cgroup/vmbed-faults-$$/cgroup.procs
        echo 16 >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages
        exec unshare --net \"$0\"";
    assert!(is_the_lab(), "this changes its machine");
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT]).arg(program);
    command
}

fn run(words: &[&str]) -> String {
    let output =
        Command::new(words[0]).args(&words[1..]).output().unwrap_or_else(|e| panic!("{words:?}: {e}"));
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

pub fn live(stage: &Stage, works: bool) -> vmbed::Result<()> {
    let image = stage.disk();
    let (device, far) = aside(move || {
        // As if the process had this number before, and as if nobody had asked for the controller yet.
        for id in 1..4 {
            let _ = std::fs::create_dir(format!("{}/vmbed-{}-{id}", cgroup(), std::process::id()));
        }
        let _ = std::fs::write(cgroup() + "/cgroup.subtree_control", "-cpu");
        // Not there yet, or of the life before.
        let _ = Command::new("ip").args(["tuntap", "add", CARD, "mode", "tap"]).output();
        run(&["ip", "link", "set", CARD, "up"]);
        (PathBuf::from(run(&["losetup", "--find", "--show", image.to_str().unwrap()])), wire::packets(CARD))
    });
    let lived = bring(stage, &device, far, works);
    *lock(&FAR) = None;
    aside(move || {
        (1..4).for_each(|id| {
            drop(std::fs::remove_dir(format!("{}/vmbed-{}-{id}", cgroup(), std::process::id())))
        });
        run(&["losetup", "--detach", device.to_str().unwrap()])
    });
    lived
}

fn bring(stage: &Stage, device: &Path, far: std::fs::File, works: bool) -> vmbed::Result<()> {
    let host = Host::open()?;
    let mut config = stage.pc();
    config.backing.kind = BackingKind::Huge2M;
    config.cgroup = Some(CgroupConfig::default());
    config.disks = vec![DiskConfig::new(device)];
    config.balloon = Some(BalloonConfig::default());
    let mut card = NetConfig::tap(CARD);
    card.vhost = Vhost::Required;
    config.nets = vec![card];
    let mut steps = vec![
        (Op::Write, 3, 2, 7),
        (Op::Flush, 0, 0, 0),
        (Op::Read, 3, 2, 0),
        (Op::Send, 0, FRAME as u32, SENT.into()),
    ];
    // For so long that the kernel serves it.
    steps.extend([(Op::Receive, 0, 0, 0); 15]);
    let vm = ready(host.builder(config), if works { &steps[..] } else { &[] })?;
    *lock(&FAR) = Some(Far::Packets(far));
    let lived = vm.start().and_then(|()| {
        vm.resize_disk(0, Bytes(SIZE))?;
        end_of(&vm)
    });
    end(host, vm, lived)
}
