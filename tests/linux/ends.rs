//! Every way in which a guest ends, and that its cause says so.

use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use vmbed::StopCause;

use crate::assets::KERNELS;
use crate::guest::{Guest, LONG, config};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    for (name, script, cause) in [
        ("poweroff", "poweroff -f", StopCause::GuestPoweroff),
        ("reboot_by_acpi", "reboot -f", StopCause::GuestReset),
        ("panic", "echo c >/proc/sysrq-trigger; sleep 60", StopCause::GuestPanic),
    ] {
        trials.push(trial(format!("ends::{name}"), move || {
            let guest = Guest::start(config(KERNELS[0], script));
            assert_eq!(guest.end(), cause, "{}", guest.console());
        }));
    }
    trials.push(trial("ends::reboot_by_keyboard_controller", || reboot("reboot=k")));
    trials.push(trial("ends::reboot_by_triple_fault", triple_fault));
    trials.push(trial("ends::power_button", power_button));
    trials.push(trial("ends::stop_while_it_works", stop));
    trials.push(trial("ends::console_input_reaches_the_guest", console_input));
}

fn with_cmdline(script: &str, more: &str) -> vmbed::VmConfig {
    let mut config = config(KERNELS[0], script);
    if let vmbed::Boot::Linux(linux) = &mut config.boot {
        linux.cmdline = format!("{} {more}", linux.cmdline.replace("reboot=k ", ""));
    }
    config
}

fn reboot(how: &str) {
    let guest = Guest::start(with_cmdline("reboot -f", how));
    assert_eq!(guest.end(), StopCause::GuestReset, "{}", guest.console());
}

fn triple_fault() {
    let guest = Guest::start(with_cmdline("reboot -f", "reboot=t"));
    assert_eq!(guest.end(), StopCause::TripleFault, "{}", guest.console());
}

/// The guest's input layer hears the button, as logind would.
fn power_button() {
    let script = "
        exec 3</dev/input/event0; echo waiting; dd bs=24 count=1 <&3 2>/dev/null | od -An -tu2 -j18 -N2 | tr -d ' ' >/run/key
        echo key=$(cat /run/key); poweroff -f";
    let guest = Guest::start(config(KERNELS[0], script));
    guest.wait_for("waiting");
    guest.vm.shutdown().unwrap();
    guest.power_off();
    assert_eq!(guest.value("key"), "116", "KEY_POWER");
}

fn stop() {
    let mut config = config(KERNELS[0], "echo working; while :; do :; done & while :; do :; done");
    config.cpus.count = 2;
    let guest = Guest::start(config);
    guest.wait_for("working");
    let begin = Instant::now();
    assert_eq!(guest.vm.stop().unwrap(), StopCause::HostStop);
    assert!(begin.elapsed() < LONG, "stop is bounded");
    assert_eq!(guest.end(), StopCause::HostStop);
}

fn console_input() {
    let script = "stty -echo; echo ready; read line; echo got=$line; read line; echo more=${#line}";
    let guest = Guest::start(config(KERNELS[0], script));
    guest.wait_for("ready");
    assert_eq!(guest.vm.console_input(b"hello\n"), 6);
    guest.wait_for("got=hello");
    // Far more than the port's 64 bytes at once, below the line discipline's limit.
    let mut rest: &[u8] = &[&[b'x'; 3000][..], b"\n"].concat();
    let end = Instant::now() + LONG;
    while !rest.is_empty() {
        assert!(Instant::now() < end, "waited {LONG:?} for the guest to take its input");
        rest = &rest[guest.vm.console_input(rest)..];
        std::thread::sleep(Duration::from_millis(1));
    }
    guest.power_off();
    assert_eq!(guest.value("more"), "3000");
}
