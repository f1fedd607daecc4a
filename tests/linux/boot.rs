//! Kernels, vCPUs and memory sizes.

use libtest_mimic::Trial;
use vmbed::{Bytes, CpuidMask, CpuidRegister};

use crate::assets::KERNELS;
use crate::guest::{Guest, config};
use crate::trial;

const LOOK: &str = "
echo cpus=$(grep -c ^processor /proc/cpuinfo)
cd /sys/devices/system/cpu
echo threads=$(cat cpu0/topology/thread_siblings_list | tr ',-' '\\n\\n' | wc -l)
echo cores=$(cat cpu*/topology/thread_siblings_list | sort -u | wc -l)
echo sockets=$(cat cpu*/topology/physical_package_id | sort -u | wc -l)
echo memory=$(grep ^MemTotal /proc/meminfo | tr -dc 0-9)
echo clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
echo kernel=$(uname -r)
echo uuid=$(cat /sys/class/dmi/id/product_uuid)
echo name=$(cat /sys/class/dmi/id/product_serial)
echo aes=$(grep -c -w aes /proc/cpuinfo)
echo bad=$(dmesg | grep -ciE 'firmware bug|call trace|bug:|unexpected')
echo calibrating=$(dmesg | grep -c 'TSC calibration')
";

pub fn add(trials: &mut Vec<Trial>) {
    // Kernel, vCPUs, threads per core, sockets, memory: every value of each at least once.
    for (kernel, vcpus, threads, sockets, mib) in [
        (KERNELS[0], 1, 1, 1, 128),
        (KERNELS[0], 4, 2, 2, 5120),
        (KERNELS[1], 2, 1, 1, 256),
        (KERNELS[2], 4, 2, 1, 512),
    ] {
        let name = format!("boot::{kernel}_{vcpus}_vcpus_{mib}_mib");
        trials.push(trial(name, move || sees_what_was_asked_for(kernel, vcpus, threads, sockets, mib)));
    }
    trials.push(trial("boot::kernels_own_decompressor", own_decompressor));
    trials.push(trial("boot::cpuid_mask_and_identity", masked));
}

fn sees_what_was_asked_for(kernel: &str, vcpus: u16, threads: u16, sockets: u16, mib: u64) {
    let mut config = config(kernel, LOOK);
    (config.cpus.count, config.cpus.threads_per_core, config.cpus.sockets) = (vcpus, threads, sockets);
    config.memory = Bytes::mib(mib);
    let guest = Guest::start(config);
    guest.power_off();
    assert_eq!(guest.value("cpus"), vcpus.to_string());
    // What lscpu shows, from where lscpu has it.
    assert_eq!(guest.value("threads"), threads.to_string());
    assert_eq!(guest.value("cores"), (vcpus / threads).to_string());
    assert_eq!(guest.value("sockets"), sockets.to_string());
    let kib: u64 = guest.value("memory").parse().unwrap();
    let (least, most) = (mib * 1024 * 80 / 100 - 24 * 1024, mib * 1024);
    assert!((least..most).contains(&kib), "{kib} KiB of {mib} MiB");
    assert_eq!(guest.value("clock"), "kvm-clock");
    let (version, flavour) = kernel.split_once('-').unwrap();
    let running = guest.value("kernel");
    assert!(running.starts_with(version) && (flavour == "generic" || running.contains(flavour)), "{running}");
    assert_eq!(guest.value("bad"), "0", "{}", guest.console());
    assert_eq!(guest.value("calibrating"), "0");
}

/// The kernel unpacks itself, and so places itself at random.
fn own_decompressor() {
    let mut config = config(KERNELS[0], LOOK);
    if let vmbed::Boot::Linux(linux) = &mut config.boot {
        linux.kaslr = true;
    }
    config.memory = Bytes::mib(256);
    let guest = Guest::start(config);
    guest.power_off();
    assert_eq!(guest.value("cpus"), "1");
}

fn masked() {
    let mut config = config(KERNELS[0], LOOK);
    // Leaf 1, ECX bit 25: AES.
    let (leaf, subleaf, register, clear, set) = (1, 0, CpuidRegister::Ecx, 1 << 25, 0);
    config.cpus.masks.push(CpuidMask { leaf, subleaf, register, clear, set });
    config.uuid = Some("01234567-89ab-cdef-0123-456789abcdef".parse().unwrap());
    config.name = "web-7".to_owned();
    let guest = Guest::start(config);
    guest.power_off();
    assert_eq!(guest.value("aes"), "0");
    assert_eq!(guest.value("uuid"), "01234567-89ab-cdef-0123-456789abcdef");
    assert_eq!(guest.value("name"), "web-7");
}
