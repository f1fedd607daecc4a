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
use crate::sweep::AFTER;
use crate::{GUEST, callers, disks, wire};

/// In the lab: the places that are reached outside.
const KNOWN: &str = "VMBED_FAULT_KNOWN";

/// The places that are reached there.
pub static REACHED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// Those places, in the lab.
pub fn known() -> Option<BTreeSet<u32>> {
    let known = std::env::var(KNOWN).ok()?;
    Some(known.split(' ').map(|number| number.parse().expect("numbers of places")).collect())
}

/// Runs this program in a lab, for what is not reached here.
pub fn in_a_lab(reached: &BTreeSet<u32>) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fetched = Command::new(root.join("tests/assets/fetch")).status().expect("tests/assets/fetch");
    assert!(fetched.success(), "tests/assets/fetch: {fetched}");
    let mut command = Command::new(root.join("tests/lab/run"));
    let hours = if crate::wants_all() { "7200" } else { "1200" };
    command.args(["--memory", "2G", "--timeout", hours, "--attempts", "3", "--", "env"]);
    for name in [GUEST, callers::PLACES, disks::BELOW, "VMBED_FAULTS"] {
        command.args(std::env::var(name).ok().map(|value| format!("{name}={value}")));
    }
    let known: Vec<_> = reached.iter().map(u32::to_string).collect();
    command.arg(format!("{KNOWN}={}", known.join(" ")));
    let output = command.arg(std::env::current_exe().unwrap()).output().expect("tests/lab/run");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let said = text(&output.stdout);
    for (word, those) in [("reached", &REACHED), ("after", &AFTER)] {
        let numbers = said.lines().find_map(|line| line.strip_prefix(word)).unwrap_or_default().split(' ');
        lock(those).extend(numbers.filter(|n| !n.is_empty()).map(|n| n.parse::<u32>().unwrap()));
    }
    assert!(output.status.success(), "{}: {said}{}", output.status, text(&output.stderr));
    println!("in the lab: {}", said.lines().rfind(|line| line.contains(" lives, ")).unwrap_or("nothing"));
}

/// Says outside what is reached.
pub fn report(reached: &BTreeSet<u32>) {
    for (word, those) in [("reached", reached), ("after", &*lock(&AFTER))] {
        let numbers: Vec<_> = those.iter().map(u32::to_string).collect();
        println!("{word} {}", numbers.join(" "));
    }
}

const CARD: &str = "vnet9";
const CGROUP: &str = "/sys/fs/cgroup/vmbed-faults";

/// A child in a network namespace and in a cgroup of its own, with what there is but once for a machine.
pub fn caged(program: &Path) -> Command {
    const SCRIPT: &str = "set -e
        modprobe -a vhost_net loop
        mkdir -p /sys/fs/cgroup/vmbed-faults
        echo +cpu >/sys/fs/cgroup/cgroup.subtree_control
        echo $$ >/sys/fs/cgroup/vmbed-faults/cgroup.procs
        echo 16 >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages
        exec unshare --net \"$0\"";
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
            let _ = std::fs::create_dir(format!("{CGROUP}/vmbed-{}-{id}", std::process::id()));
        }
        let _ = std::fs::write(format!("{CGROUP}/cgroup.subtree_control"), "-cpu");
        // Not there yet, or of the life before.
        let _ = Command::new("ip").args(["tuntap", "add", CARD, "mode", "tap"]).output();
        run(&["ip", "link", "set", CARD, "up"]);
        (PathBuf::from(run(&["losetup", "--find", "--show", image.to_str().unwrap()])), wire::packets(CARD))
    });
    let lived = bring(stage, &device, far, works);
    *lock(&FAR) = None;
    aside(move || {
        (1..4)
            .for_each(|id| drop(std::fs::remove_dir(format!("{CGROUP}/vmbed-{}-{id}", std::process::id()))));
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
