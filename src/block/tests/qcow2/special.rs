#![forbid(unsafe_code)]
//! Images that imago cannot read: extended L2 entries, and zstd.

use super::*;
use crate::block::{create_disk, open};
use crate::units;

const SIZE: u64 = 6 << 20;

/// Something that packs, different everywhere.
pub(super) fn content(seed: u8) -> Vec<u8> {
    let word = |i: u64| (i / 3).wrapping_mul(0x9e37_79b9).wrapping_add(seed.into()) as u8;
    (0..SIZE).map(word).collect()
}

/// What qemu-io does to an image after it was made: whole and part clusters and subclusters, zeroes, what is packed.
fn touch(images: &Images, image: &str, cluster: u64) {
    let sub = (cluster / 32).max(512);
    let steps = [
        format!("write -P 5 {} {}", sub, 3 * sub),
        format!("write -P 6 {} {}", 2 * cluster - sub, 2 * sub),
        format!("write -z {} {}", 3 * cluster + 4 * sub, 5 * sub),
        format!("write -z {} {}", 5 * cluster, cluster),
        format!("write -P 7 {} {}", 6 * cluster, 2 * cluster),
        format!("discard {} {}", 7 * cluster, cluster),
        format!("write -P 8 {} {}", 7 * cluster + sub, sub),
        format!("write -P 9 {} 512", SIZE - 512),
    ];
    let mut words = vec!["qemu-io", "-f", "qcow2"];
    steps.iter().filter(|_| cluster < 1 << 20).for_each(|step| words.extend(["-c", step]));
    images.run(&[&words[..], &[image]].concat());
}

/// Disk by disk, what we read is what QEMU reads.
fn alike(images: &Images, config: &DiskConfig) {
    let path = config.path.as_ref().unwrap().to_str().unwrap();
    images.run(&["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, "plain"]);
    assert!(all(&mut images.open(config)) == std::fs::read(images.path("plain")).unwrap(), "{config:?}");
}

#[test]
fn images_of_the_two_kinds_are_read_as_qemu_reads_them() {
    let images = Images::new("special");
    std::fs::write(images.path("base"), content(1)).unwrap();
    std::fs::write(images.path("other"), content(2)).unwrap();
    for options in [
        "extended_l2=on,cluster_size=16k",
        "extended_l2=on",
        "extended_l2=on,cluster_size=2M,refcount_bits=64,lazy_refcounts=on",
        "extended_l2=on,compression_type=zstd",
        "compression_type=zstd",
        "compression_type=zstd,cluster_size=512",
        "compression_type=zstd,cluster_size=2M",
    ] {
        let cluster = match options {
            o if o.contains("16k") => 16 << 10,
            o if o.contains("=512") => 512,
            o if o.contains("2M") => 2 << 20,
            _ => 64 << 10,
        };
        let named = |image: &str| {
            let config = DiskConfig::qcow2(images.path(image));
            DiskConfig { readonly: true, ..config }
        };
        // On a base, which is shorter.
        images.create(&["-b", "base", "-F", "raw", "-o", options, "based", "8M"]);
        touch(&images, "based", cluster);
        let again = format!("write -c -P 3 {} {cluster}", 9 * cluster);
        if cluster < 1 << 20 {
            images.run(&["qemu-io", "-f", "qcow2", "-c", &again, "based"]);
        }
        alike(&images, &named("based").based_on(images.path("base"), DiskFormat::Raw));
        // Packed, with something written to it since.
        let packed = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options];
        images.run(&[&packed[..], &["other", "image"]].concat());
        let config = named("image");
        alike(&images, &config);
        touch(&images, "image", cluster);
        alike(&images, &config);
        an_image_on_top(&images, &config, |top| {
            alike(&images, top);
            images.run(&["qemu-img", "check", "-f", "qcow2", "top"]);
        });
    }
}

/// One of ours, based on it: what is written to it in part keeps what lies below.
pub(super) fn an_image_on_top(images: &Images, below: &DiskConfig, alike: impl Fn(&DiskConfig)) {
    let (top, base) = (images.path("top"), below.path.clone().unwrap());
    let _ = std::fs::remove_file(&top);
    let mut config = DiskConfig::qcow2(&top).based_on(&base, DiskFormat::Qcow2);
    config.passphrases = below.passphrases.clone();
    create_disk(&top, DiskFormat::Qcow2, units::Bytes(0), config.backing.first()).unwrap();
    let mut rig = images.open(&config);
    for (at, byte) in [(0x1200, 21), (0x1_0000, 22), (SIZE - 4096, 23)] {
        write(&mut rig, at, 1024, byte);
    }
    assert_eq!(rig.one(BlockOp::Flush, 0, 0, &[]), None);
    drop(rig);
    let before = std::fs::metadata(&base).unwrap().len();
    alike(&config);
    assert_eq!(std::fs::metadata(&base).unwrap().len(), before);
}

#[test]
fn an_image_with_subclusters_in_a_data_file() {
    let images = Images::new("special-data");
    for raw in ["off", "on"] {
        let options =
            format!("extended_l2=on,data_file=data-{raw},data_file_raw={raw},preallocation=metadata");
        images.create(&["-o", &options, "image", "6M"]);
        touch(&images, "image", 64 << 10);
        let mut config = DiskConfig::qcow2(images.path("image"));
        (config.readonly, config.data_file) = (true, Some(images.path(&format!("data-{raw}"))));
        alike(&images, &config);
        config.data_file = None;
        let error = open("disk0", &images.path("image"), &config).err().unwrap();
        assert!(error.to_string().contains("name it in data_file"), "{error}");
    }
}

#[test]
fn what_cannot_be_written_or_read_is_refused_with_a_remedy() {
    let images = Images::new("special-refused");
    for options in ["compression_type=zstd", "extended_l2=on,cluster_size=128k"] {
        images.create(&["-o", options, "image", "4M"]);
        let path = images.path("image");
        let opened = |config: &DiskConfig| open("disk3", &path, config);
        let error = opened(&DiskConfig::qcow2(&path)).err().unwrap();
        assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("disk3"), "{error}");
        assert!(error.to_string().contains("set readonly"), "{error}");
        let words = ["convert", "-O", "qcow2", "-o", "compression_type=zlib,extended_l2=off"];
        assert!(error.to_string().contains(&words.join(" ")), "{error}");
        images.run(&[&["qemu-img"], &words[..], &["image", "converted"]].concat());
        drop(images.open(&DiskConfig::qcow2(images.path("converted"))));
        let mut config = DiskConfig::qcow2(&path);
        config.readonly = true;
        config = config.based_on(images.path("converted"), DiskFormat::Raw);
        let error = opened(&config).err().unwrap();
        assert!(error.to_string().contains("based on nothing"), "{error}");
    }
}

#[test]
fn a_damaged_image_of_them_is_an_error_and_nothing_else() {
    let images = Images::new("special-damaged");
    std::fs::write(images.path("other"), content(2)).unwrap();
    let options = "extended_l2=on,compression_type=zstd,cluster_size=16k";
    images.run(&["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "other", "image"]);
    touch(&images, "image", 16 << 10);
    let good = std::fs::read(images.path("image")).unwrap();
    let mut config = DiskConfig::qcow2(images.path("image"));
    config.readonly = true;
    let mut dice = 0x9e37_79b9_7f4a_7c15;
    let (mut opened, mut failed) = (0, 0);
    for round in 0..200 {
        let mut bad = good.clone();
        // The header, the tables, anything; or the end is gone.
        let reach = [112, 0x3_0000, bad.len() as u64][round % 3];
        for _ in 0..=throw(&mut dice) % 8 {
            let thrown = throw(&mut dice);
            bad[(thrown % reach) as usize] = (thrown >> 40) as u8;
        }
        if round % 7 == 0 {
            bad.truncate(throw(&mut dice) as usize % bad.len());
        }
        std::fs::write(images.path("image"), &bad).unwrap();
        let Ok(disk) = open("disk0", &images.path("image"), &config) else { continue };
        opened += 1;
        let mut rig: Disk = Rig::on(disk);
        let size = rig.disk.size().min(2 * SIZE);
        for at in (0..size).step_by(0x8000) {
            let length = (size - at).min(0x8000);
            let done = rig.one(BlockOp::Read, at, length, &[(0, length as usize)]);
            failed += u32::from(done.is_some());
        }
    }
    assert!(opened > 50 && failed > 50, "{opened} {failed}");
}
