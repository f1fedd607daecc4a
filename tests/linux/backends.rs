//! Two Debians that are connected by a pair of sockets and nothing else, each with a disk of the embedder's that takes its
//! time and answers out of order.

use std::os::unix::net::UnixDatagram;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use vmbed::{BlockBackend, BlockOp, BlockRequest, DiskConfig, NetConfig};

use crate::assets::KERNELS;
use crate::devices::{noise, sha256};
use crate::guest::{Guest, config};
use crate::trial;

const SIZE: usize = 4 << 20;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("backends::a_disk_and_a_network_of_ones_own", two_guests));
}

/// A disk as a network would have it: another thread does the requests, later, and the last one first.
struct Remote {
    size: u64,
    requests: Sender<BlockRequest>,
}

impl BlockBackend for Remote {
    fn size(&self) -> u64 {
        self.size
    }

    fn submit(&mut self, request: BlockRequest) {
        self.requests.send(request).unwrap();
    }
}

/// What the far end has, and how often it turned an order around.
#[derive(Default)]
struct Far {
    bytes: Vec<u8>,
    reordered: u32,
    flushes: u32,
}

fn remote(bytes: Vec<u8>) -> (Remote, Arc<Mutex<Far>>, std::thread::JoinHandle<()>) {
    let (requests, arrive) = channel();
    let far = Arc::new(Mutex::new(Far { bytes, ..Far::default() }));
    let (own, size) = (far.clone(), far.lock().unwrap().bytes.len() as u64);
    let thread = std::thread::spawn(move || serve(&arrive, &own));
    (Remote { size, requests }, far, thread)
}

fn serve(arrive: &Receiver<BlockRequest>, far: &Mutex<Far>) {
    // Until the disk is gone.
    while let Ok(first) = arrive.recv() {
        let (mut batch, end) = (vec![first], Instant::now() + Duration::from_millis(3));
        while let Ok(next) = arrive.recv_timeout(end.saturating_duration_since(Instant::now())) {
            batch.push(next);
        }
        let mut far = far.lock().unwrap();
        far.reordered += u32::from(batch.len() > 1);
        for mut request in batch.into_iter().rev() {
            let at = request.offset() as usize;
            let place = at..at + request.len() as usize;
            match request.op() {
                BlockOp::Read => assert_eq!(request.copy_from(0, &far.bytes[place.clone()]), place.len()),
                BlockOp::Write { .. } => {
                    assert_eq!(request.copy_to(0, &mut far.bytes[place.clone()]), place.len())
                }
                _ => far.flushes += 1,
            }
            assert!(request.complete(Ok(())));
        }
    }
}

fn two_guests() {
    let content = noise(31, SIZE);
    let (from, source, source_thread) = remote(content.clone());
    let (to, copy, copy_thread) = remote(vec![0; SIZE]);
    let (near, far) = UnixDatagram::pair().unwrap();
    let start = |script: &str, disk: Remote, net: &UnixDatagram| {
        let mut config = config(KERNELS[0], script);
        config.disks.push(DiskConfig::attached());
        config.nets.push(NetConfig::attached());
        Guest::start_with(config, |builder| builder.disk_backend(0, disk).net_fd(0, net).unwrap())
    };
    let first = start(
        "ip addr add 10.9.0.1/24 dev eth0; ip link set eth0 up
        for i in 0 1 2 3; do dd if=/dev/vda of=/dev/null bs=64k skip=$((i * 16)) count=16 2>/dev/null & done; wait
        nc -l -p 5000 </dev/vda",
        from,
        &near,
    );
    // busybox' nc ends with whichever end comes first, its input's or the network's.
    let second = start(
        "ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up
        mkfifo /run/never
        until [ -s /run/got ]; do nc 10.9.0.1 5000 <>/run/never >/run/got || sleep 0.5; done
        dd if=/run/got of=/dev/vda bs=64k conv=fsync 2>/dev/null
        echo 3 >/proc/sys/vm/drop_caches
        echo got=$(sha256sum </dev/vda | cut -d' ' -f1)",
        to,
        &far,
    );
    second.power_off();
    first.power_off();
    assert_eq!(second.value("got"), sha256(&content));
    let size = SIZE as u64;
    let (sent, received) = (first.vm.net_statistics(0).unwrap(), second.vm.net_statistics(0).unwrap());
    assert!(sent.tx_bytes > size && received.rx_bytes > size, "{sent:?} {received:?}");
    let (read, written) = (first.vm.disk_statistics(0).unwrap(), second.vm.disk_statistics(0).unwrap());
    assert!(read.read_bytes >= size && read.errors == 0, "{read:?}");
    assert!(
        written.written_bytes >= size && written.read_bytes >= size && written.flushes > 0,
        "{written:?}"
    );
    drop((first, second));
    source_thread.join().unwrap();
    copy_thread.join().unwrap();
    let (source, copy) = (source.lock().unwrap(), copy.lock().unwrap());
    assert!(copy.bytes == content && copy.flushes > 0);
    // On a slow machine one of the guests may never have two requests on their way at once.
    assert!(source.reordered + copy.reordered > 0, "no answer overtook another");
}
