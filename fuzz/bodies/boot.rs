//! What a kernel is told: its command line, its initrd and the memory map, looked for by the pointers of its protocol.

use arbitrary::{Result, Unstructured};
use vmbed::internals::load_kernel;
use vmbed::{LinuxBoot, VmConfig};

use super::kernel::{bzimage, elf, put};

/// What the configuration takes, and the kernel's buffer.
const MAX_CMDLINE: usize = 2047;

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Kernels that were loaded, by Linux' protocol and by PVH.
    pub linux: u32,
    pub pvh: u32,
    /// Bytes of command lines and of initrds that were found where the kernel looks.
    pub cmdline: u64,
    pub initrd: u64,
    /// Initrds that lie at a page, since there is no room to have their huge pages alone.
    pub tight: u32,
    /// Kernels that were told of none, though their image speaks of one.
    pub denied: u32,
    /// Command lines that are too long for the configuration, or for the kernel; and those with a NUL.
    pub long: u32,
    pub too_long: u32,
    pub nul: u32,
    /// Initrds that do not fit, and those that are empty.
    pub too_large: u32,
    pub empty: u32,
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("linux", self.linux.into()),
            ("pvh", self.pvh.into()),
            ("cmdline", self.cmdline),
            ("initrd", self.initrd),
            ("tight", self.tight.into()),
            ("denied", self.denied.into()),
            ("long", self.long.into()),
            ("too_long", self.too_long.into()),
            ("nul", self.nul.into()),
            ("too_large", self.too_large.into()),
            ("empty", self.empty.into()),
        ]
    }
}

/// Runs one input. Panics where a kernel would be told something else than what was asked for.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let mut depth = Depth::default();
    let _ = attempt(&mut u, &mut depth);
    depth
}

/// Any text; sometimes with what ends it early in C.
fn text(u: &mut Unstructured<'_>) -> Result<String> {
    let mut text = String::new();
    let length = match u.int_in_range(0..=5u8)? {
        0 => u.int_in_range(0..=3000)?,
        1 => *u.choose(&[0, 254, 255, 256, 2046, 2047, 2048])?,
        _ => u.int_in_range(0..=300)?,
    };
    let one = *u.choose(&["x", "quiet ", "\u{e4}", "\n", "\u{1f600}"])?;
    while text.len() + one.len() <= length {
        text.push_str(one);
    }
    text.extend(std::iter::repeat_n('.', length - text.len()));
    if u.ratio(1u8, 10u8)? {
        text.insert(0, '\0');
    }
    Ok(text)
}

fn attempt(u: &mut Unstructured<'_>, depth: &mut Depth) -> Result<()> {
    let memory = *u.choose(&[4u64, 4, 8, 16])? << 20;
    let is_linux = u.arbitrary::<bool>()?;
    let cmdline = text(u)?;
    let initrd = initrd(u, memory)?;
    let kaslr = u.arbitrary()?;
    let mut kernel = if is_linux { bzimage(u)? } else { elf(u)? };
    let (mut longest, mut highest, mut speaks) = (MAX_CMDLINE, u64::from(u32::MAX), false);
    if is_linux {
        highest = 0x7fff_ffff;
        if u.arbitrary()? {
            let most = *u.choose(&[255u32, 0, 2047, 4096, u32::MAX])?;
            put(&mut kernel, 0x238, &most.to_le_bytes());
            longest = longest.min(most as usize);
        }
        if u.arbitrary()? {
            let most = *u.choose(&[0x37ff_ffffu32, 0x7f_ffff, 0x3f_ffff, 0x20_0fff, 0, u32::MAX])?;
            put(&mut kernel, 0x22c, &most.to_le_bytes());
            highest = most.into();
        }
        if u.ratio(1u8, 4u8)? {
            // An image that speaks of an initrd.
            put(&mut kernel, 0x218, &u.arbitrary::<[u8; 8]>()?);
            speaks = kernel[0x21c..0x220] != [0; 4];
        }
    }
    let has_nul = cmdline.contains('\0');
    check(&cmdline, depth);
    // A NUL comes no further.
    if has_nul {
        return Ok(());
    }
    let loaded = match load_kernel(memory, &kernel, initrd.as_deref(), &cmdline, kaslr) {
        Ok(loaded) => loaded,
        Err(error) => {
            let error = error.to_string();
            match initrd {
                Some(bytes) if error.contains("the initrd") => {
                    depth.too_large += u32::from(!bytes.is_empty());
                    depth.empty += u32::from(bytes.is_empty());
                    assert!(bytes.is_empty() || error.contains("too large"), "{error}");
                    // It may lie a page from the end, and must be below what the kernel can take.
                    let room = memory.min(highest + 1).saturating_sub(8 << 20);
                    assert!(bytes.len() as u64 >= room || bytes.is_empty(), "{error}");
                }
                _ if error.contains("the command line") => {
                    assert!(cmdline.len() > longest, "{error}");
                    depth.too_long += 1;
                }
                // The kernel itself: another target's business.
                _ => {}
            }
            return Ok(());
        }
    };
    (depth.linux, depth.pvh) = (depth.linux + u32::from(!loaded.pvh), depth.pvh + u32::from(loaded.pvh));
    let told = loaded.told;
    assert!(cmdline.len() <= longest);
    assert_eq!(told.cmdline, cmdline.as_bytes());
    depth.cmdline += cmdline.len() as u64;
    let filled = &loaded.filled[0];
    assert_eq!(told.initrd.is_some(), initrd.is_some());
    depth.denied += u32::from(speaks && !loaded.pvh && initrd.is_none());
    let ram: Vec<_> =
        told.map.iter().filter(|(_, kind)| *kind == 1).map(|(range, _)| range.clone()).collect();
    for pair in told.map.windows(2) {
        assert!(pair[0].0.end <= pair[1].0.start, "the map is in order: {:x?}", told.map);
    }
    assert!(ram.iter().all(|range| range.start < range.end && range.end <= memory));
    let is_ram =
        |range: &std::ops::Range<u64>| ram.iter().any(|r| r.start <= range.start && range.end <= r.end);
    assert!(is_ram(filled), "the kernel lies in RAM: {filled:x?} {ram:x?}");
    if let (Some(range), Some(bytes)) = (told.initrd, initrd) {
        assert_eq!((&told.initrd_bytes, &range), (&bytes, &loaded.filled[1]));
        assert!(is_ram(&range) && range.start % 4096 == 0 && range.end <= highest + 1, "{range:x?}");
        assert!(range.start >= filled.end || range.end <= filled.start, "over the kernel: {range:x?}");
        depth.initrd += bytes.len() as u64;
        depth.tight += u32::from(range.start % (2 << 20) != 0);
    }
    Ok(())
}

/// None, a small one, or one about as large as the room for it.
fn initrd(u: &mut Unstructured<'_>, memory: u64) -> Result<Option<Vec<u8>>> {
    let length = match u.int_in_range(0..=7u8)? {
        0 | 1 => return Ok(None),
        2 => 0,
        3 => (memory as usize).saturating_sub(u.int_in_range(0..=3 << 20)?),
        _ => u.int_in_range(1..=20_000)?,
    };
    let seed = u.arbitrary::<u8>()?;
    // By blocks: there may be megabytes of it, and each step that is taken here is counted as coverage.
    let mut bytes = vec![0; length];
    for (block, number) in bytes.chunks_mut(509).zip(0usize..) {
        block.fill(seed.wrapping_add(number as u8));
    }
    Ok(Some(bytes))
}

/// What the configuration says of it.
fn check(cmdline: &str, depth: &mut Depth) {
    let fields = match VmConfig::linux(LinuxBoot::new("kernel").cmdline(cmdline)).validate() {
        Ok(()) => 0,
        Err(error) => error.fields().iter().filter(|field| field.field == "boot.cmdline").count(),
    };
    let (nul, long) = (cmdline.contains('\0'), cmdline.len() > MAX_CMDLINE);
    assert_eq!(fields, usize::from(nul) + usize::from(long), "{} bytes", cmdline.len());
    (depth.nul, depth.long) = (depth.nul + u32::from(nul), depth.long + u32::from(long));
}
