//! Many guests in one process: one crashes, the others do not notice.

use std::io::{Read, Write};
use std::net::TcpListener;

use libtest_mimic::Trial;
use vmbed::{Bytes, DiskConfig, NetConfig, StopCause};

use crate::assets::KERNELS;
use crate::devices::{TempFile, noise, sha256};
use crate::guest::{Guest, config};
use crate::net::{Tap, accept};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("many::sixteen_guests_and_one_crashes", sixteen));
}

const GUESTS: usize = 16;
const CRASHES: usize = 7;

struct Member {
    guest: Guest,
    disk: TempFile,
    listener: TcpListener,
    _tap: Tap,
}

fn sixteen() {
    let members: Vec<Member> = (0..GUESTS).map(start).collect();
    assert_eq!(members[CRASHES].guest.end(), StopCause::GuestPanic, "{}", members[CRASHES].guest.console());
    for (i, member) in members.iter().enumerate().filter(|(i, _)| *i != CRASHES) {
        let sent = noise(100 + i as u64, 256 << 10);
        let mut stream = accept(&member.listener, &member.guest);
        let written = stream.write_all(&sent);
        assert!(written.is_ok(), "guest {i} takes no data: {written:?}\n{}", member.guest.console());
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        member.guest.power_off();
        assert_eq!(member.guest.value("net"), sha256(&sent), "guest {i}");
        assert_eq!(member.guest.value("disk"), sha256(&noise(i as u64, 1 << 20)), "guest {i}");
        let mut written = [0; 8];
        std::fs::File::open(member.disk.path()).unwrap().read_exact(&mut written).unwrap();
        assert_eq!(&written, format!("guest{i:03}").as_bytes());
    }
}

fn start(i: usize) -> Member {
    let tap = Tap::new();
    let disk = TempFile::new(&noise(i as u64, 1 << 20));
    let listener = TcpListener::bind((tap.host(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let crash = if i == CRASHES { "echo c >/proc/sysrq-trigger" } else { "" };
    let script = format!(
        "{up} {crash}
        echo disk=$(sha256sum </dev/vda | cut -d' ' -f1)
        printf guest{i:03} | dd of=/dev/vda bs=8 count=1 conv=fsync,notrunc 2>/dev/null
        nc {host} {port} </dev/null >/run/got; echo net=$(sha256sum </run/got | cut -d' ' -f1)",
        up = tap.up(),
        host = tap.host()
    );
    let mut config = config(KERNELS[0], &script);
    config.memory = Bytes::mib(96);
    config.disks.push(DiskConfig::new(disk.path()));
    config.nets.push(NetConfig::tap(&tap.name));
    Member { guest: Guest::start(config), disk, listener, _tap: tap }
}
