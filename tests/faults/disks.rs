//! Other disks: of the embedder's own, and images on images that are encrypted.

use std::fs::File;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmbed::{
    BlockBackend, BlockOp, BlockRequest, Bytes, ConsoleKind, DiskBacking, DiskConfig, DiskFormat, Host,
    NetConfig, RateLimit,
};

use crate::driven::{FRAME, Far, SENT, SIZE};
use crate::guests::{Op, outcome};
use crate::life::{FAR, Stage, aside, end_of, expect, later, lock, remove};
use crate::others::{Step, end, ready};
use crate::{guests, others, wire};

/// Where the images are that others are based on.
pub const BELOW: &str = "VMBED_FAULT_BELOW";
const PASSPHRASE: &str = "open sesame";
/// What is in them, everywhere.
const CONTENT: u8 = 3;

/// Makes what other images are based on, for all children: `raw`, and on it `encrypted`.
pub fn make_images(directory: &Path) {
    let _ = std::fs::remove_dir_all(directory);
    std::fs::create_dir(directory).expect("a directory for images");
    std::fs::write(directory.join("raw"), vec![CONTENT; SIZE as usize]).unwrap();
    let secret = format!("secret,id=key,data={PASSPHRASE}");
    let options = "encrypt.format=luks,encrypt.iter-time=1,encrypt.key-secret=key";
    let size = SIZE.to_string();
    // It measures how fast this machine is, and now and then sees its clock stand still.
    let words = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        &secret,
        "-o",
        options,
        "-b",
        "raw",
        "-F",
        "raw",
        "encrypted",
        &size,
    ];
    let mut made = qemu_img(directory, &words);
    for _ in 0..200 {
        if !made.as_ref().is_err_and(|said| said.contains("accurate CPU usage")) {
            break;
        }
        made = qemu_img(directory, &words);
    }
    made.unwrap();
    let target = "driver=qcow2,encrypt.format=luks,encrypt.key-secret=key,file.filename=encrypted";
    let words = ["convert", "-n", "--object", &secret, "-f", "raw", "--target-image-opts", "raw", target];
    qemu_img(directory, &words).unwrap();
}

fn qemu_img(directory: &Path, words: &[&str]) -> Result<(), String> {
    let output = Command::new("qemu-img").args(words).current_dir(directory).output().expect("qemu-img");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(format!("qemu-img {words:?}: {said}")) }
}

fn below(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(BELOW).unwrap()).join(name)
}

pub fn layered(stage: &Stage, works: bool) -> vmbed::Result<()> {
    let (one, two) = (stage.file("one"), stage.file("two"));
    let lived = stack(&one, &two, stage, works);
    remove(&one);
    remove(&two);
    lived
}

const STEPS: [Step; 6] = [
    (Op::Read, 3, 2, 0),
    (Op::Write, 3, 2, 7),
    (Op::Flush, 0, 0, 0),
    (Op::Read, 2, 3, 0),
    // Lets interrupts through, and holds them back.
    (Op::Interrupts, 0, 0, 0),
    (Op::Interrupts, 0, 0, 1),
];

/// Two disks, one of which is based on an encrypted image, both of which grow.
fn stack(one: &Path, two: &Path, stage: &Stage, works: bool) -> vmbed::Result<()> {
    let on = |name: &str, format| DiskBacking { path: below(name), format };
    let (encrypted, raw) = (on("encrypted", DiskFormat::Qcow2), on("raw", DiskFormat::Raw));
    vmbed::create_disk(one, DiskFormat::Qcow2, Bytes(SIZE), Some(&encrypted))?;
    vmbed::create_disk(two, DiskFormat::Qcow2, Bytes(SIZE), Some(&raw))?;
    let host = Host::open()?;
    let mut config = stage.pc();
    config.disks = vec![
        DiskConfig::qcow2(one)
            .based_on(encrypted.path, encrypted.format)
            .based_on(&raw.path, raw.format)
            .unlocked_by(PASSPHRASE),
        DiskConfig::qcow2(two).based_on(&raw.path, raw.format),
    ];
    let steps = if works { &STEPS[..] } else { &[] };
    let vm = ready(host.builder(config), steps)?;
    let lived = vm.start().and_then(|()| {
        vm.resize_disk(0, Bytes(2 * SIZE))?;
        vm.resize_disk(1, Bytes(2 * SIZE))?;
        end_of(&vm)
    });
    let mut results = vec![0; 16 * steps.len()];
    if works
        && matches!(lived, Ok(Some(vmbed::StopCause::GuestReset)))
        && vm.read_memory(guests::RESULTS, &mut results).is_ok()
    {
        let good = |step: usize| outcome(&results, step).0 == 0;
        let sums = [0, 3].map(|step| outcome(&results, step).2);
        let content = 512 * u64::from(CONTENT);
        if good(0) && sums[0] != 2 * content || (0..4).all(good) && sums[1] != content + 512 * (7 + 8) {
            println!("LOST: the guest read something else: {sums:?}");
        }
    }
    end(host, vm, lived)
}

/// A disk in memory, which takes its time on another thread.
struct Ram(Arc<Mutex<Vec<u8>>>);

impl BlockBackend for Ram {
    fn size(&self) -> u64 {
        SIZE
    }

    fn submit(&mut self, mut request: BlockRequest) {
        let memory = self.0.clone();
        later(move || {
            std::thread::sleep(Duration::from_millis(15));
            let at = request.offset() as usize..(request.offset() + request.len()) as usize;
            match request.op() {
                BlockOp::Read => drop(request.copy_from(0, &lock(&memory)[at])),
                BlockOp::Write { .. } => drop(request.copy_to(0, &mut lock(&memory)[at])),
                _ => {}
            }
            request.complete(Ok(()));
        });
    }
}

/// Everything is the embedder's: a disk and a network that must not go fast, another disk that is open already, and a socket for the console.
pub fn own(stage: &Stage) -> vmbed::Result<()> {
    let (near, again, far, listens, output, file) = aside({
        let disk = stage.disk();
        move || {
            let (near, far) = UnixDatagram::pair().unwrap();
            let (listens, output) = UnixStream::pair().unwrap();
            far.set_nonblocking(true).unwrap();
            wire::narrow(&near);
            let file = File::options().read(true).write(true).open(disk).unwrap();
            let again = near.try_clone().unwrap();
            (near, again, far, listens, output, file)
        }
    });
    let lived = bring(stage, (&near, again, far), &output, &file);
    *lock(&FAR) = None;
    aside(move || drop((near, output, file)));
    expect(others::heard(listens) == [b'x'; 16], "what was printed");
    lived
}

fn bring(
    stage: &Stage,
    (near, again, far): (&UnixDatagram, UnixDatagram, UnixDatagram),
    output: &UnixStream,
    file: &File,
) -> vmbed::Result<()> {
    let memory = Arc::new(Mutex::new(vec![0; SIZE as usize]));
    let host = Host::open()?;
    let mut config = stage.pc();
    config.console = ConsoleKind::Virtio;
    config.disks = vec![DiskConfig::attached(), DiskConfig::attached()];
    config.nets = vec![NetConfig::attached()];
    let mut rate = RateLimit::default();
    (rate.ops_per_second, rate.ops_burst) = (1000, 1);
    (config.disks[0].rate, config.nets[0].send_rate) = (rate, rate);
    let builder = host.builder(config).disk_backend(0, Ram(memory)).disk_fd(1, file)?;
    let mut steps = vec![
        (Op::Write, 3, 2, 7),
        (Op::Flush, 0, 0, 0),
        (Op::Read, 3, 2, 0),
        (Op::Print, 0, 16, b'x' as u32),
    ];
    // More than the socket has room for.
    steps.push((Op::Room, 0, 0, 0));
    steps.extend([(Op::Send, 0, FRAME as u32, SENT.into()); 24]);
    // A driver that begins anew amid a request.
    steps.extend([(Op::BeginRead, 3, 2, 0), (Op::Reset, 0, 0, 0), (Op::Read, 3, 2, 0)]);
    let vm = ready(builder.net_fd(0, near)?.console_output(output)?, &steps)?;
    let lived = vm.start().and_then(|()| {
        *lock(&FAR) = Some(Far::Slow(far, again, 0));
        end_of(&vm)
    });
    end(host, vm, lived)
}
