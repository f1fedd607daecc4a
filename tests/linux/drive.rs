//! Debian on the embedder's own event loop and vCPU threads, with not one device thread but the disk's.

use std::io::Write;
use std::net::{Shutdown, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use vmbed::{DiskConfig, Dispatcher, NetConfig, StopCause, ThreadRole, VcpuReturn, VmState};
use vmm_sys_util::poll::PollContext;

use crate::assets::KERNELS;
use crate::devices::{TempFile, noise, sha256};
use crate::guest::{Guest, LONG, config};
use crate::net::{Tap, accept};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("drive::on_the_callers_loop_and_threads", callers));
}

fn callers() {
    let (tap, content) = (Tap::new(), noise(21, 4 << 20));
    let listener = TcpListener::bind((tap.host(), 0)).unwrap();
    let file = TempFile::new(&vec![0; content.len()]);
    let script = format!(
        "{up}
        nc {host} {port} </dev/null >/run/got
        dd if=/run/got of=/dev/vda bs=64k conv=fsync 2>/dev/null
        echo got=$(sha256sum </run/got | cut -d' ' -f1) cpus=$(nproc)",
        up = tap.up(),
        host = tap.host(),
        port = listener.local_addr().unwrap().port(),
    );
    let mut config = config(KERNELS[0], &script);
    config.cpus.count = 2;
    config.nets.push(NetConfig::tap(&tap.name));
    config.disks.push(DiskConfig::new(file.path()));
    let dispatcher = Dispatcher::new().unwrap();
    let said = Arc::new(Mutex::new(Vec::new()));
    let roles = Arc::new(Mutex::new(Vec::new()));
    let (kept, seen) = (said.clone(), roles.clone());
    let guest = Guest::start_with(config, |builder| {
        builder
            .dispatcher(&dispatcher)
            .caller_vcpus()
            .on_thread_start(move |info| seen.lock().unwrap().push(info.role))
            .console_callback(move |bytes| kept.lock().unwrap().extend(bytes))
    });
    std::thread::scope(|scope| {
        for vcpu in 0..2 {
            let vm = &guest.vm;
            scope.spawn(move || while vm.run_vcpu(vcpu).unwrap() == VcpuReturn::Interrupted {});
        }
        scope.spawn(|| turn(&dispatcher, &guest));
        let mut stream = accept(&listener, &guest);
        stream.write_all(&content).unwrap();
        stream.shutdown(Shutdown::Both).unwrap();
        // A stop, should the guest not come to its end: the threads above wait for it.
        if guest.vm.wait_timeout(LONG).unwrap().is_none() {
            let _ = guest.vm.stop();
        }
    });
    dispatcher.dispatch().unwrap();
    assert_eq!(guest.end(), StopCause::GuestPoweroff, "{}", guest.console());
    let text = String::from_utf8_lossy(&said.lock().unwrap()).replace('\r', "");
    assert_eq!(text, guest.console());
    assert_eq!(guest.value("got"), format!("{} cpus=2", sha256(&content)));
    assert_eq!(sha256(&std::fs::read(file.path()).unwrap()), sha256(&content));
    let mut roles = roles.lock().unwrap().clone();
    roles.sort_by_key(|role| *role == ThreadRole::Control);
    assert_eq!(roles, [ThreadRole::Device, ThreadRole::Control], "the disk's, and the one for the end");
}

/// An event loop of the embedder's.
fn turn(dispatcher: &Dispatcher, guest: &Guest) {
    let (poll, deadline) = (PollContext::<u32>::new().unwrap(), Instant::now() + LONG);
    poll.add(dispatcher, 0).unwrap();
    while !matches!(guest.vm.state(), VmState::Stopped(_)) && Instant::now() < deadline {
        if poll.wait_timeout(Duration::from_millis(50)).unwrap().iter_readable().next().is_some() {
            dispatcher.dispatch().unwrap();
        }
    }
}
