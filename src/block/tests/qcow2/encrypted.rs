#![forbid(unsafe_code)]
//! Encrypted images: every cipher, chaining and hash that qemu-img has, read as QEMU reads them.

use super::special::{an_image_on_top, content};
use super::*;
use crate::block::open;

const SECRET: &str = "secret,id=key,data=open sesame";
const PASSPHRASE: &str = "open sesame";

/// `qemu-img create`, which measures how fast this machine is, and now and then sees its clock stand still.
fn create(images: &Images, options: &str, rest: &[&str]) {
    let options = format!("encrypt.key-secret=key,{options}");
    let words = ["create", "-q", "-f", "qcow2", "--object", SECRET, "-o", &options];
    for attempt in 1.. {
        let mut command = Command::new("qemu-img");
        let output = command.args([&words, rest].concat()).current_dir(&images.0).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return;
        }
        assert!(said.contains("accurate CPU usage") && attempt < 200, "{options}: {said}");
    }
}

/// An image for QEMU's tools, with what opens it.
fn options_for(image: &str, format: &str) -> String {
    format!("driver=qcow2,encrypt.format={format},encrypt.key-secret=key,file.filename={image}")
}

fn touch(images: &Images, image: &str, format: &str) {
    let words = ["qemu-io", "--object", SECRET, "--image-opts", &options_for(image, format)];
    let steps = [
        "write -P 5 512 1536",
        "write -P 6 130048 2048",
        "write -z 200704 8192",
        "write -P 7 1M 192k",
        "discard 1M 64k",
        "write -P 8 1049088 512",
        "write -P 9 4193792 512",
    ];
    let steps: Vec<_> = steps.iter().flat_map(|step| ["-c", step]).collect();
    images.run(&[&words[..], &steps].concat());
}

fn alike(images: &Images, config: &DiskConfig, format: &str) {
    let image = config.path.as_ref().unwrap().file_name().unwrap().to_str().unwrap();
    let (words, image) = (["qemu-img", "convert", "--object", SECRET], options_for(image, format));
    images.run(&[&words[..], &["--image-opts", "-O", "raw", &image, "plain"]].concat());
    let read = all(&mut images.open(config));
    assert!(read == std::fs::read(images.path("plain")).unwrap(), "{config:?} ({format})");
}

fn named(images: &Images, image: &str) -> DiskConfig {
    DiskConfig::qcow2(images.path(image)).readonly().unlocked_by(PASSPHRASE)
}

/// Made with these options on a base that is shorter, written to by QEMU, and read.
fn trial(images: &Images, format: &str, options: &str) {
    let _ = std::fs::remove_file(images.path("image"));
    let quick = if format == "luks" { "encrypt.iter-time=1," } else { "" };
    let options = format!("{quick}encrypt.format={format}{options}");
    create(images, &options, &["-b", "base", "-F", "raw", "image", "8M"]);
    touch(images, "image", format);
    let config = named(images, "image").based_on(images.path("base"), DiskFormat::Raw);
    alike(images, &config, format);
}

#[test]
fn encrypted_images_are_read_as_qemu_reads_them() {
    let images = Images::new("encrypted");
    std::fs::write(images.path("base"), content(1)).unwrap();
    for options in [
        "",
        "cipher-alg=aes-128,ivgen-alg=plain,cluster_size=512,refcount_bits=64",
        "cipher-alg=aes-192,cipher-mode=xts,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=ripemd160",
        "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,extended_l2=on",
        "cipher-alg=aes-128,cipher-mode=ecb,hash-alg=md5,extended_l2=on,cluster_size=16k",
        "cipher-alg=aes-256,cipher-mode=ctr,hash-alg=sha1,cluster_size=2M,lazy_refcounts=on",
        "cipher-alg=serpent-256,cipher-mode=xts,hash-alg=sha512,compat=0.10",
        "cipher-alg=serpent-128,cipher-mode=cbc,ivgen-alg=plain,hash-alg=sha224",
        "cipher-alg=twofish-192,cipher-mode=xts,ivgen-alg=essiv,ivgen-hash-alg=md5,hash-alg=sha384",
        "cipher-alg=twofish-128,cipher-mode=ctr,ivgen-alg=plain",
        "cipher-alg=cast5-128,cipher-mode=cbc",
        "cipher-alg=cast5-128,cipher-mode=ctr,ivgen-alg=plain",
    ] {
        let named = |option: &str| {
            let of_encryption = ["cipher", "ivgen", "hash"].iter().any(|kind| option.starts_with(kind));
            format!(",{}{option}", if of_encryption { "encrypt." } else { "" })
        };
        let options: String = options.split(',').filter(|option| !option.is_empty()).map(named).collect();
        trial(&images, "luks", &options);
    }
    for options in ["", ",compat=0.10", ",cluster_size=4k"] {
        trial(&images, "aes", options);
    }
}

#[test]
fn an_encrypted_image_below_one_of_ours_and_in_a_data_file() {
    let images = Images::new("encrypted-below");
    std::fs::write(images.path("other"), content(2)).unwrap();
    create(&images, "encrypt.format=luks,encrypt.iter-time=1", &["image", "6M"]);
    let words =
        ["qemu-img", "convert", "-n", "--object", SECRET, "-f", "raw", "--target-image-opts", "other"];
    images.run(&[&words[..], &[&options_for("image", "luks")]].concat());
    let config = named(&images, "image");
    assert!(all(&mut images.open(&config)) == content(2));
    an_image_on_top(&images, &config, |top| {
        let below = options_for("image", "luks").replace(',', ",backing.");
        let image = format!("driver=qcow2,file.filename=top,backing.{below}");
        let words = |verb| ["qemu-img", verb, "--object", SECRET, "--image-opts"];
        images.run(&[&words("convert")[..], &["-O", "raw", &image, "plain"]].concat());
        assert!(all(&mut images.open(top)) == std::fs::read(images.path("plain")).unwrap());
        images.run(&[&words("check")[..], &[&image]].concat());
    });
    for raw in ["off", "on"] {
        let options =
            format!("encrypt.format=luks,encrypt.iter-time=1,data_file=data-{raw},data_file_raw={raw}");
        let _ = std::fs::remove_file(images.path("image"));
        create(&images, &options, &["image", "6M"]);
        touch(&images, "image", "luks");
        let data = images.path(&format!("data-{raw}"));
        alike(&images, &named(&images, "image").with_data_in(data), "luks");
    }
}

#[test]
fn what_opens_an_image_is_found_among_what_was_given() {
    let images = Images::new("encrypted-keys");
    create(&images, "encrypt.format=luks,encrypt.iter-time=1", &["image", "1M"]);
    let path = images.path("image");
    let refused = |config: &DiskConfig| open("disk2", &path, config).err().unwrap().to_string();
    let mut config = DiskConfig::qcow2(&path).readonly();
    let error = refused(&config);
    assert!(error.contains("disk2") && error.contains("there are no passphrases"), "{error}");
    config = config.unlocked_by("open barley");
    let error = refused(&config);
    assert!(error.contains("no passphrase opens it") && !error.contains("barley"), "{error}");
    config = config.unlocked_by(PASSPHRASE);
    assert!(all(&mut images.open(&config)).iter().all(|byte| *byte == 0));
    config.readonly = false;
    let error = refused(&config);
    assert!(error.contains("is encrypted") && error.contains("set readonly"), "{error}");
    // A second passphrase, and then only that one.
    let amend = |options: &str| {
        let words = ["qemu-img", "amend", "--object", SECRET, "--object", "secret,id=new,data=other"];
        let options = format!("encrypt.{options},encrypt.iter-time=1");
        let rest = ["-o", &options, "--image-opts", &options_for("image", "luks")];
        (1..200).any(|_| {
            let output =
                Command::new("qemu-img").args(&words[1..]).args(rest).current_dir(&images.0).output();
            output.unwrap().status.success()
        })
    };
    assert!(amend("state=active,encrypt.new-secret=new,encrypt.keyslot=5"));
    let other = DiskConfig::qcow2(&path).readonly().unlocked_by("other");
    drop((images.open(&other), images.open(&named(&images, "image"))));
}

/// One byte of its keys is enough.
#[test]
fn a_damaged_header_is_an_error_and_nothing_else() {
    let images = Images::new("encrypted-damaged");
    create(&images, "encrypt.format=luks,encrypt.iter-time=1", &["image", "1M"]);
    let good = std::fs::read(images.path("image")).unwrap();
    let header = good.windows(6).position(|bytes| bytes == b"LUKS\xba\xbe").unwrap();
    let config = named(&images, "image");
    let mut dice = 0x9e37_79b9_7f4a_7c15;
    let (mut opened, mut failed) = (0, 0);
    for round in 0..120 {
        let mut bad = good.clone();
        let (from, reach) = [(header, 256), (0, 160), (header + 4096, 128_000)][round % 3];
        for _ in 0..=throw(&mut dice) % 4 {
            let thrown = throw(&mut dice);
            bad[from + (thrown % reach) as usize] = (thrown >> 40) as u8;
        }
        // As many rounds as it said, or it takes as long as it says.
        bad[header + 164..header + 168].copy_from_slice(&good[header + 164..header + 168]);
        bad[header + 212..header + 216].copy_from_slice(&good[header + 212..header + 216]);
        if round % 10 == 0 {
            bad.truncate(throw(&mut dice) as usize % bad.len());
        }
        std::fs::write(images.path("image"), &bad).unwrap();
        match open("disk0", &images.path("image"), &config) {
            Ok(disk) => {
                let mut rig: Disk = Rig::on(disk);
                let _ = rig.one(BlockOp::Read, 0, 4096, &[(0, 4096)]);
                opened += 1;
            }
            Err(_) => failed += 1,
        }
    }
    assert!(opened > 5 && failed > 50, "{opened} {failed}");
    for (at, value, wrong) in [
        (8, &b"rot13\0"[..], "cipher \"rot13\""),
        (40, &b"xts-plain65\0"[..], "mode \"xts-plain65\""),
        (72, &b"crc32\0"[..], "hash \"crc32\""),
        (108, &[0, 0, 0, 65][..], "length of its key"),
        (164, &[255; 4][..], "rounds of key derivation"),
        (212, &[0; 4][..], "rounds of key derivation"),
        (248, &[255; 4][..], "slot 0"),
        (252, &[0; 4][..], "slot 0"),
    ] {
        let mut bad = good.clone();
        bad[header + at..header + at + value.len()].copy_from_slice(value);
        std::fs::write(images.path("image"), &bad).unwrap();
        let error = open("disk0", &images.path("image"), &config).err().unwrap();
        assert!(
            format!("{error} {:?}", std::error::Error::source(&error)).contains(wrong),
            "{wrong}: {error}"
        );
    }
}
