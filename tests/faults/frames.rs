//! Where the frames of functions begin and who called them, as the compilers have left it for unwinding (`.eh_frame`): read off a file here, asked
//! of a thread's stack by `callers.rs`.

use std::path::Path;

use addr2line::gimli::{
    self, BaseAddresses, CfaRule, CieOrFde, EhFrame, LittleEndian, RegisterRule, UnwindContext,
    UnwindSection, X86_64,
};
use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind, Register};
use object::{Object, ObjectSection, SectionKind};

/// What holds from an address on, up to that of the next row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub start: u64,
    pub frame: Frame,
    /// Where, from there, the function keeps its caller's frame pointer, if it has one of its own.
    pub kept: Option<i32>,
}

/// Where the frame begins: the address above that of who called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Nobody says.
    Unknown,
    /// Nobody called: a thread begins here.
    None,
    /// So far from the stack pointer.
    Stack(i32),
    /// So far from the frame pointer, and, where that is not known, from the stack pointer.
    Pointer(i32, Option<i32>),
}

const NONE: i32 = i32::MIN;

impl Row {
    pub const SIZE: usize = 24;

    fn bytes(&self) -> [u8; Self::SIZE] {
        let [which, offset, below] = match self.frame {
            Frame::Unknown => [0, 0, 0],
            Frame::None => [1, 0, 0],
            Frame::Stack(offset) => [2, offset, 0],
            Frame::Pointer(offset, below) => [3, offset, below.unwrap_or(NONE)],
        };
        let mut bytes = [0; Self::SIZE];
        bytes[..8].copy_from_slice(&self.start.to_le_bytes());
        for (at, number) in [(8, which), (12, offset), (16, below), (20, self.kept.unwrap_or(NONE))] {
            bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    pub fn parse(bytes: &[u8]) -> Self {
        let number = |at: usize| i32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let known = |at: usize| Some(number(at)).filter(|offset| *offset != NONE);
        let frame = match number(8) {
            1 => Frame::None,
            2 => Frame::Stack(number(12)),
            3 => Frame::Pointer(number(12), known(16)),
            _ => Frame::Unknown,
        };
        let start = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        Self { start, frame, kept: known(20) }
    }
}

/// All rows of a file, in their order.
pub fn of(path: &Path) -> Vec<u8> {
    let data = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = object::File::parse(&*data).expect("an ELF file");
    let section = file.section_by_name(".eh_frame").expect("frames");
    let address = |name: &str| file.section_by_name(name).map_or(0, |section| section.address());
    let bases = BaseAddresses::default().set_eh_frame(section.address()).set_text(address(".text"));
    let frames = EhFrame::new(section.data().expect("its bytes"), LittleEndian);
    let text: Vec<_> = file.sections().filter(|section| section.kind() == SectionKind::Text).collect();
    let code = |at: u64| {
        let section = text.iter().find(|s| (s.address()..s.address() + s.size()).contains(&at))?;
        section.data().ok()?.get((at - section.address()) as usize..)
    };
    let below = |from: u64, to: u64| depth(code(from)?.get(..(to - from) as usize)?);
    let mut rows = read(&frames, &bases, below).expect("frames that can be read");
    // Of a function's end and another one's beginning, the beginning holds.
    rows.sort_by_key(|row| (row.start, row.frame == Frame::Unknown));
    rows.dedup_by_key(|row| row.start);
    rows.iter().flat_map(Row::bytes).collect()
}

fn read(
    frames: &EhFrame<gimli::EndianSlice<'_, LittleEndian>>,
    bases: &BaseAddresses,
    depth: impl Fn(u64, u64) -> Option<i32>,
) -> gimli::Result<Vec<Row>> {
    let (mut rows, mut context) = (Vec::new(), UnwindContext::new());
    let mut entries = frames.entries(bases);
    while let Some(entry) = entries.next()? {
        let CieOrFde::Fde(partial) = entry else { continue };
        let function = partial.parse(EhFrame::cie_from_offset)?;
        let mut table = function.rows(frames, bases, &mut context)?;
        let (mut own, mut lowest, mut before) = (Vec::new(), 0, None);
        let mut below = None;
        while let Some(row) = table.next_row()? {
            let start = row.start_address();
            let frame = match row.cfa() {
                _ if row.register(X86_64::RA) == Some(RegisterRule::Undefined) => Frame::None,
                CfaRule::RegisterAndOffset { register: X86_64::RSP, offset } => Frame::Stack(*offset as i32),
                CfaRule::RegisterAndOffset { register: X86_64::RBP, offset } => {
                    // It has just been set, above nothing but itself.
                    if before == Some(Frame::Stack(16)) && *offset == 16 {
                        below = depth(start, function.end_address());
                    }
                    Frame::Pointer(*offset as i32, None)
                }
                _ => Frame::Unknown,
            };
            let saved = row.registers().filter_map(|(_, rule)| match rule {
                RegisterRule::Offset(offset) => Some(*offset as i32),
                _ => None,
            });
            lowest = saved.min().unwrap_or(0).min(lowest);
            let kept = match row.register(X86_64::RBP) {
                Some(RegisterRule::Offset(offset)) => Some(offset as i32),
                _ => None,
            };
            own.push(Row { start, frame, kept });
            before = Some(frame);
        }
        // What it has saved lies above the stack pointer.
        let below = below.filter(|below| 16 + below >= -lowest);
        for row in &mut own {
            if let Frame::Pointer(16, stack) = &mut row.frame {
                *stack = below.map(|below| 16 + below);
            }
        }
        rows.append(&mut own);
        rows.push(Row { start: function.end_address(), frame: Frame::Unknown, kept: None });
    }
    Ok(rows)
}

/// How far the stack goes down from the frame pointer, of a function that has just set it, where it goes no further anywhere.
fn depth(code: &[u8]) -> Option<i32> {
    let (mut depth, mut begins) = (0, true);
    for i in &mut Decoder::new(64, code, DecoderOptions::NONE) {
        let moves = i.op0_kind() == OpKind::Register && i.op0_register() == Register::RSP;
        let by = match i.mnemonic() {
            Mnemonic::Push => 8,
            Mnemonic::Sub if moves => i.try_immediate(1).ok()? as i32,
            Mnemonic::Add if moves => -(i.try_immediate(1).ok()? as i32),
            // Aligned.
            Mnemonic::And if moves => return None,
            // A large one is touched page by page.
            Mnemonic::Mov if i.memory_base() == Register::RSP && i.op1_kind() == OpKind::Immediate32to64 => 0,
            _ => {
                begins = false;
                0
            }
        };
        match by {
            by if begins => depth += by,
            1.. => return None,
            _ => {}
        }
    }
    Some(depth)
}
