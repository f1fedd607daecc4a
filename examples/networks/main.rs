//! What `make demo-net` runs: four guests (stock Debian kernels with a busybox) on bridges of the host with VLANs and on a NAT network, and the
//! same four on a switch inside of this process, with no privilege. Prints who reached whom, and whether that is as it should be.
//!
//! `networks bridge KERNEL INITRD`, `ovs` and `vxlan` want to be root in a network namespace of their own; `networks switch KERNEL INITRD`
//! wants `/dev/kvm` and nothing else.

use std::process::ExitCode;

#[path = "../common/base64.rs"]
mod base64;
mod beyond;
mod bridge;
mod guests;
mod inside;
mod tools;

/// Whatever went wrong.
type Done<T> = Result<T, Box<dyn std::error::Error>>;

const USAGE: &str = "usage: networks bridge|ovs|vxlan|switch KERNEL INITRD (run it through make demo-net)

bridge   br0 with a trunk to the host's card, two guests in VLAN 10 and one in VLAN 20; a fourth behind NAT,
         with an address from dnsmasq. As root, in a network namespace of its own.
ovs      the same four on Open vSwitch, ports with tags and a trunk; the same rights.
vxlan    the same four on two hosts (namespaces), with a tunnel for each tenant; the same rights.
switch   the same four on a switch inside of this process. As anybody who may open /dev/kvm.";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["bridge", kernel, initrd] => bridge::run(kernel, initrd),
        ["ovs", kernel, initrd] => beyond::tags(kernel, initrd),
        ["vxlan", kernel, initrd] => beyond::vxlan(kernel, initrd),
        ["switch", kernel, initrd] => inside::run(kernel, initrd),
        ["--help" | "-h"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            println!("networks: not as it should be");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("networks: {error}");
            ExitCode::FAILURE
        }
    }
}
