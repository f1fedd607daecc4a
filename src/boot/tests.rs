#![cfg(test)]
//! Synthetic kernels: good ones are loaded where they say, and each lie is an error that names the file
//! and the field.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::config::{CpuMode, LinuxBoot, Uuid};

/// A file that is gone when the test ends.
struct TempFile(PathBuf);

impl TempFile {
    fn new(bytes: &[u8]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("vmbed-boot-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

const ENTRY: u32 = 0x100_0010;

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// An ELF kernel: one segment of 64 bytes in file and 4 KiB in memory at 16 MiB, and a PVH note.
fn elf() -> Vec<u8> {
    let mut image = vec![0; 0x240];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 18, &62u16.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &56u16.to_le_bytes());
    put(&mut image, 56, &2u16.to_le_bytes());
    let header = |kind: u32, offset: u64, address: u64, file: u64, memory: u64| {
        let mut h = vec![0; 56];
        put(&mut h, 0, &kind.to_le_bytes());
        for (at, value) in [(8, offset), (24, address), (32, file), (40, memory)] {
            put(&mut h, at, &value.to_le_bytes());
        }
        h
    };
    put(&mut image, 64, &header(1, 0x200, 0x100_0000, 0x40, 0x1000));
    put(&mut image, 120, &header(4, 0x100, 0, 36, 36));
    // Another vendor's note first, then Xen's.
    let note = |name: &[u8], kind: u32, value: u32| {
        let mut n = Vec::new();
        for word in [name.len() as u32, 4, kind] {
            n.extend(word.to_le_bytes());
        }
        n.extend(name);
        n.resize(n.len().next_multiple_of(4), 0);
        n.extend(value.to_le_bytes());
        n
    };
    put(&mut image, 0x100, &note(b"", 18, 7));
    put(&mut image, 0x110, &note(b"Xen\0", 18, ENTRY));
    put(&mut image, 0x200, &[0xaa; 0x40]);
    image
}

/// A bzImage around `payload`; packed as Linux' build does when `lz4`.
fn bzimage(payload: &[u8], lz4: bool) -> Vec<u8> {
    let mut packed = Vec::new();
    if lz4 {
        packed.extend(0x184c_2102u32.to_le_bytes());
        for part in payload.chunks(8 << 20) {
            let block = lz4_flex::block::compress(part);
            packed.extend((block.len() as u32).to_le_bytes());
            packed.extend(block);
        }
        packed.extend((payload.len() as u32).to_le_bytes());
    } else {
        packed.extend(payload);
    }
    let mut image = vec![0; 1024];
    image[0x1f1] = 1;
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x20fu16.to_le_bytes());
    image[0x211] = 1;
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x248, &0x400u32.to_le_bytes());
    put(&mut image, 0x24c, &(packed.len() as u32).to_le_bytes());
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut image, 0x260, &0x10_0000u32.to_le_bytes());
    image.resize(1024 + 0x400, 0x90);
    image.extend(packed);
    image
}

fn memory() -> Memory {
    Memory::new(64 << 20).unwrap()
}

fn load(boot: &LinuxBoot, memory: &Memory) -> Result<Entry> {
    let identity = Identity { uuid: Uuid([7; 16]), name: String::new() };
    linux(memory, boot, &acpi::tests::machine(1), &identity)
}

fn load_bytes(bytes: &[u8]) -> Result<(Entry, Memory)> {
    let file = TempFile::new(bytes);
    let memory = memory();
    load(&LinuxBoot::new(&file.0).cmdline("quiet"), &memory).map(|entry| (entry, memory))
}

fn check_elf(entry: &Entry, memory: &Memory) {
    assert_eq!(entry.rip, u64::from(ENTRY));
    assert_eq!(entry.protocol, Protocol::Pvh { start_info: place::PVH_START });
    let mut bytes = [0; 0x41];
    memory.read_slice(&mut bytes, GuestAddress(0x100_0000)).unwrap();
    assert_eq!((&bytes[..0x40], bytes[0x40]), (&[0xaa; 0x40][..], 0));
    assert_eq!(memory.read_obj::<u32>(GuestAddress(place::PVH_START)).unwrap(), 0x336e_c578);
    let mut cmdline = [0; 6];
    memory.read_slice(&mut cmdline, GuestAddress(place::CMDLINE)).unwrap();
    assert_eq!(&cmdline, b"quiet\0");
}

#[test]
fn an_elf_kernel_and_the_same_in_an_lz4_bzimage_load_alike() {
    for image in [elf(), bzimage(&elf(), true)] {
        let (entry, memory) = load_bytes(&image).unwrap();
        check_elf(&entry, &memory);
        assert_eq!(entry.filled, vec![0x100_0000..0x100_1000; 1]);
    }
}

#[test]
fn the_zero_page_holds_the_kernels_own_header_and_zeroes_behind_it() {
    let mut image = bzimage(b"packed otherwise", false);
    // The header ends at 0x268 by its jump; what follows in the file is code.
    put(&mut image, 0x268, &[0xcc; 0x80]);
    // An initrd that nobody has loaded.
    put(&mut image, 0x218, &[0xee; 8]);
    let (_, memory) = load_bytes(&image).unwrap();
    let mut page = [0; 4096];
    memory.read_slice(&mut page, GuestAddress(place::ZERO_PAGE)).unwrap();
    let mut header = image[0x1f1..0x268].to_vec();
    header[0x210 - 0x1f1] = 0xff;
    put(&mut header, 0x218 - 0x1f1, &[0; 8]);
    put(&mut header, 0x228 - 0x1f1, &(place::CMDLINE as u32).to_le_bytes());
    assert_eq!(page[0x1f1..0x268], header);
    assert!(page[0x268..0x2d0].iter().all(|b| *b == 0), "no code behind the header");
    assert_eq!(page[0x70..0x78], acpi::RSDP.to_le_bytes());
    // RAM, what is kept for firmware, RAM, ECAM.
    assert_eq!(page[0x1e8], 4);
    let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    let map = [
        (0, layout::FIRMWARE_AREA.start, 1),
        (layout::FIRMWARE_AREA.start, 0x10_0000 - layout::FIRMWARE_AREA.start, 2),
        (0x10_0000, 63 << 20, 1),
        (layout::ECAM.start, 1 << 20, 2),
    ];
    for (at, (start, size, kind)) in (0x2d0..).step_by(20).zip(map) {
        assert_eq!((word(at), word(at + 8), page[at + 16]), (start, size, kind));
    }
}

#[test]
fn a_kernel_without_pvh_out_of_a_bzimage_starts_as_its_decompressor_would_start_it() {
    let mut kernel = elf();
    put(&mut kernel, 0x11c, b"Foo");
    put(&mut kernel, 24, &0x100_0040u64.to_le_bytes());
    let (entry, memory) = load_bytes(&bzimage(&kernel, true)).unwrap();
    assert_eq!(entry.rip, 0x100_0040);
    assert_eq!(entry.protocol, Protocol::Linux64 { zero_page: place::ZERO_PAGE });
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x100_0000)).unwrap(), 0xaa);
    put(&mut kernel, 24, &0x200_0040u64.to_le_bytes());
    refused(bzimage(&kernel, true), &[], &["e_entry", "0x2000040", "outside"]);
}

/// As a real kernel: several blocks, a segment across their border, stretches of zeroes.
#[test]
fn an_image_of_several_blocks_arrives_whole() {
    let mut kernel = elf();
    kernel.resize(20 << 20, 0);
    let (start, length) = (0x1000usize, (19u64 << 20) + 123);
    for at in (start..20 << 20).step_by(3 * 4096 + 5) {
        kernel[at] = at as u8 | 1;
    }
    put(&mut kernel, 64 + 8, &(start as u64).to_le_bytes());
    put(&mut kernel, 64 + 32, &length.to_le_bytes());
    put(&mut kernel, 64 + 40, &(length + 4096).to_le_bytes());
    for image in [bzimage(&kernel, true), kernel.clone()] {
        let (_, memory) = load_bytes(&image).unwrap();
        let mut loaded = vec![0; length as usize];
        memory.read_slice(&mut loaded, GuestAddress(0x100_0000)).unwrap();
        assert!(loaded == kernel[start..start + length as usize]);
    }
}

#[test]
fn another_compression_or_kaslr_leaves_the_unpacking_to_the_kernel() {
    let file = TempFile::new(&bzimage(&elf(), true));
    let mut kaslr = LinuxBoot::new(&file.0);
    kaslr.kaslr = true;
    let other = TempFile::new(&bzimage(b"\x28\xb5\x2f\xfd zstd, say", false));
    for boot in [kaslr, LinuxBoot::new(&other.0)] {
        let memory = memory();
        let entry = load(&boot, &memory).unwrap();
        assert_eq!((entry.rip, entry.page_tables), (0x100_0200, place::PAGE_TABLES));
        assert_eq!(entry.protocol, Protocol::Linux64 { zero_page: place::ZERO_PAGE });
        let magic: u32 = memory.read_obj(GuestAddress(place::ZERO_PAGE + 0x202)).unwrap();
        assert_eq!(magic.to_le_bytes(), *b"HdrS");
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x100_0000)).unwrap(), 0x90);
        // The first large page of the identity map.
        let pml4: u64 = memory.read_obj(GuestAddress(entry.page_tables)).unwrap();
        let pdpt: u64 = memory.read_obj(GuestAddress(pml4 & !0xfff)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(pdpt & !0xfff)).unwrap(), 0x83);
    }
}

/// Changes bytes of a good image and requires an error with these words.
fn refused(mut image: Vec<u8>, changes: &[(usize, &[u8])], words: &[&str]) {
    for (at, bytes) in changes {
        put(&mut image, *at, bytes);
    }
    let error = load_bytes(&image).err().unwrap_or_else(|| panic!("accepted, not refused for {words:?}"));
    assert_eq!(error.kind(), ErrorKind::BadImage, "{error}");
    let text = error.to_string();
    assert!(text.contains("vmbed-boot-"), "names the file: {text}");
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
}

#[test]
fn every_lie_in_an_elf_header_is_named() {
    let huge = &u64::MAX.to_le_bytes();
    refused(elf(), &[(18, &183u16.to_le_bytes())], &["another architecture", "183"]);
    refused(elf(), &[(4, &[1])], &["64-bit"]);
    refused(elf(), &[(54, &[40])], &["program headers of 40 bytes"]);
    refused(elf(), &[(56, &[0, 0])], &["0 program headers"]);
    refused(elf(), &[(56, &[0xff, 0xff])], &["65535 program headers"]);
    refused(elf(), &[(32, huge)], &["e_phoff"]);
    refused(elf(), &[(64 + 8, huge)], &["program header 0", "its bytes end"]);
    refused(elf(), &[(64 + 32, &0x1000u64.to_le_bytes())], &["program header 0", "its bytes end"]);
    refused(elf(), &[(64 + 40, &0x3fu64.to_le_bytes())], &["64 bytes in the file, 63 in memory"]);
    refused(elf(), &[(64 + 24, huge)], &["wrap"]);
    refused(elf(), &[(64 + 24, &0x1000u64.to_le_bytes())], &["above 1 MiB"]);
    refused(elf(), &[(64 + 24, &(64u64 << 20).to_le_bytes())], &["not all guest memory"]);
    refused(elf(), &[(64 + 40, &(1u64 << 40).to_le_bytes())], &["not all guest memory"]);
    refused(elf(), &[(64, &[2])], &["PT_LOAD"]);
    refused(elf(), &[(0x11c, b"Foo")], &["PVH"]);
    refused(elf(), &[(0x114, huge)], &["PVH"]);
    refused(elf(), &[(0x120, &0x200_0000u32.to_le_bytes())], &["PVH entry", "outside"]);
    // A second segment over the first.
    let second = |address: u64| {
        let mut segment = elf()[64..120].to_vec();
        put(&mut segment, 24, &address.to_le_bytes());
        segment
    };
    refused(elf(), &[(120, &second(0x100_0fff))], &["program header 1", "overlaps", "0x1000000-0x1001000"]);
    refused(elf(), &[(120, &second(0x0ff_f001))], &["program header 1", "overlaps"]);
    refused(elf(), &[(120, &second(0x100_1000))], &["PVH"]);
    refused(elf()[..40].to_vec(), &[], &["ends within its ELF header"]);
    refused(elf()[..0x210].to_vec(), &[], &["its bytes end"]);
}

#[test]
fn every_lie_in_a_bzimage_header_is_named() {
    let good = || bzimage(&elf(), true);
    let packed = || bzimage(b"packed otherwise", false);
    refused(good(), &[(0x206, &0x20bu16.to_le_bytes())], &["protocol 2.11"]);
    refused(good(), &[(0x236, &[0])], &["64-bit"]);
    refused(good(), &[(0x211, &[0])], &["64-bit"]);
    refused(good(), &[(0x1f1, &[0xff])], &["setup_sects"]);
    refused(good(), &[(0x248, &[0xff; 4])], &["truncated"]);
    refused(good(), &[(0x24c, &[0xff; 4])], &["truncated"]);
    let length = good().len();
    refused(good(), &[(length - 4, &[0xff; 4])], &["unpacks to at most"]);
    refused(
        good(),
        &[(length - 4, &0x241u32.to_le_bytes())],
        &["unpacks to 576 by the block at 0", "says 577"],
    );
    refused(good(), &[(length - 4, &0x100u32.to_le_bytes())], &["in the block at 0", "too much"]);
    refused(good(), &[(length - 4, &[0; 4])], &["empty payload"]);
    refused(good(), &[(1024 + 0x404, &[0; 4])], &["block at", "has 0 of"]);
    refused(good(), &[(1024 + 0x404, &[0xff; 4])], &["block at", "has 4294967295 of"]);
    refused(good(), &[(1024 + 0x400 + 10, &[0xff; 40])], &["LZ4"]);
    refused(packed(), &[(0x258, &0xffff_f000u64.to_le_bytes())], &["not all guest memory"]);
    refused(packed(), &[(0x258, &u64::MAX.to_le_bytes())], &["not all guest memory"]);
    refused(packed(), &[(0x258, &0u64.to_le_bytes())], &["not all guest memory"]);
    refused(packed(), &[(0x260, &[0xff; 4])], &["not all guest memory"]);
    refused(good()[..0x240].to_vec(), &[], &["truncated"]);
    refused(vec![0x1f, 0x8b, 8, 0, 0, 0], &[], &["gzip"]);
    refused(b"MZ\0\0 arm64".to_vec(), &[], &["arm64"]);
    refused(b"hello, world".to_vec(), &[], &["not an x86 Linux kernel"]);
    refused(vec![0x7f], &[], &["truncated"]);
    refused(Vec::new(), &[], &["is empty"]);
}

#[test]
fn files_that_cannot_be_are_named() {
    let error = |path: &str| load(&LinuxBoot::new(path), &memory()).unwrap_err();
    assert_eq!(error("/no/such/kernel").kind(), ErrorKind::NotFound);
    assert!(error("/no/such/kernel").to_string().contains("the kernel '/no/such/kernel'"));
    assert!(error("/tmp").to_string().contains("is a directory"));
    assert!(error("/dev/null").to_string().contains("not a regular file"));
    let (kernel, pipe) = (TempFile::new(&elf()), TempFile::new(&[]));
    std::fs::remove_file(&pipe.0).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&pipe.0).status().unwrap().success());
    assert!(error(pipe.0.to_str().unwrap()).to_string().contains("not a regular file"), "and does not wait");
    let initrd = |path: &str| load(&LinuxBoot::new(&kernel.0).initrd(path), &memory()).unwrap_err();
    assert!(initrd("/tmp").to_string().contains("the initrd '/tmp' is a directory"));
    let empty = TempFile::new(&[]);
    assert!(initrd(empty.0.to_str().unwrap()).to_string().contains("is empty"));
    std::fs::File::options().write(true).open(&empty.0).unwrap().set_len(3 << 30).unwrap();
    assert!(initrd(empty.0.to_str().unwrap()).to_string().contains("3221225472 bytes, more than"));
    assert!(error(empty.0.to_str().unwrap()).to_string().contains("3221225472 bytes, more than"));
}

#[test]
fn the_initrd_lies_high_and_one_too_large_is_refused_with_both_sizes() {
    let kernel = TempFile::new(&elf());
    let initrd = TempFile::new(&[0x5a; 5000]);
    let memory = memory();
    let entry = load(&LinuxBoot::new(&kernel.0).initrd(&initrd.0), &memory).unwrap();
    let range = entry.filled[1].clone();
    assert_eq!((range.start % (2 << 20), range.end - range.start), (0, 5000));
    assert!(range.start >= 60 << 20);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(range.end - 1)).unwrap(), 0x5a);
    assert_eq!(memory.read_obj::<u64>(GuestAddress(place::PVH_MODULES)).unwrap(), range.start);

    let large = TempFile::new(&[]);
    std::fs::File::options().write(true).open(&large.0).unwrap().set_len(60 << 20).unwrap();
    let error = load(&LinuxBoot::new(&kernel.0).initrd(&large.0), &memory).unwrap_err();
    assert!(error.to_string().contains("62914560") && error.to_string().contains("too large"), "{error}");
    let error = load(&LinuxBoot::new(&kernel.0).initrd("/no/initrd"), &memory).unwrap_err();
    assert!(error.to_string().contains("the initrd '/no/initrd'"), "{error}");
}

#[test]
fn a_command_line_longer_than_the_kernel_takes_is_refused() {
    let mut image = bzimage(&elf(), true);
    put(&mut image, 0x238, &4u32.to_le_bytes());
    let error = load_bytes(&image).err().unwrap();
    assert!(error.to_string().contains("has 5 bytes") && error.to_string().contains("takes 4"), "{error}");
}

#[test]
fn a_bare_long_mode_guest_gets_its_map_at_the_end_of_low_memory() {
    let memory = memory();
    let entry = bare(&memory, &crate::config::BareBoot::new(CpuMode::Long, 0x1000, [0xf4])).unwrap();
    assert_eq!(entry.page_tables, (64 << 20) - (6 << 12));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1000)).unwrap(), 0xf4);
    // Every 2 MiB of the 4 GiB, and nothing behind the memory's end.
    for page in [0u64, 511, 512, 1023, 2047] {
        let entry: u64 = memory.read_obj(GuestAddress(entry.page_tables + (2 << 12) + page * 8)).unwrap();
        assert_eq!(entry, page << 21 | 0x83);
    }
}

/// Thousands of bent images neither panic nor load outside of memory.
#[test]
fn bent_images_are_loaded_or_refused_but_never_more() {
    let mut seed = 0x1234_5678_9abc_def0u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let memory = memory();
    let (mut loaded, mut refused) = (0, 0);
    for round in 0..3000 {
        let mut image = match round % 3 {
            0 => elf(),
            1 => bzimage(&elf(), true),
            _ => bzimage(b"packed", false),
        };
        for _ in 0..1 + random() % 4 {
            let at = (random() % image.len() as u64) as usize;
            let at = if random() % 2 == 0 { at } else { at % 0x280 };
            image[at] = [0, 0xff, 0x7f, 0x80, random() as u8][(random() % 5) as usize];
        }
        image.truncate(if random() % 8 == 0 {
            (random() % image.len() as u64) as usize
        } else {
            image.len()
        });
        let file = TempFile::new(&image);
        match load(&LinuxBoot::new(&file.0), &memory) {
            Ok(entry) => {
                assert!(entry.filled.iter().all(|r| r.end <= memory.size()));
                loaded += 1;
            }
            Err(_) => refused += 1,
        }
    }
    assert!(loaded > 100 && refused > 100, "{loaded} loaded, {refused} refused: the test has lost its bite");
}
