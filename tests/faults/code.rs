//! A program's machine code: its functions, and who calls whom.

use std::collections::HashMap;

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};
use object::{
    Object, ObjectSection, ObjectSymbol, ObjectSymbolTable, RelocationTarget, SectionKind, SymbolKind,
};

/// What the C library does without the kernel, or by calls that the supervisor lets pass (`PASSED`); the beginnings of their names. What calls it
/// all the same is seen when it does.
const QUIET: [&str; 40] = [
    "_Unwind_",
    "__cxa_",
    "__errno_location",
    "__libc_start_main",
    "__tls_get_addr",
    "__xpg_strerror_r",
    "_exit",
    "abort",
    "exit",
    "bcmp",
    "mem",
    "strlen",
    "malloc",
    "realloc",
    "free",
    "posix_memalign",
    "posix_spawn",
    "getenv",
    "setenv",
    "getauxval",
    "gnu_get_libc_version",
    "dl",
    "clock_",
    "nanosleep",
    "closedir",
    "munmap",
    "mprotect",
    "getpid",
    "gettid",
    "sched_yield",
    "sig",
    "pthread_sigmask",
    "pthread_attr",
    "pthread_key",
    "pthread_self",
    "pthread_set",
    "pthread_getattr",
    "pthread_detach",
    "pthread_join",
    "sysconf",
];
/// But these.
const LOUD: [&str; 3] = ["memfd_create", "sigpending", "sigtimedwait"];

#[derive(Clone, PartialEq)]
pub enum Callee {
    Function(usize),
    /// A system call of the C library's.
    Kernel,
    /// What a table of functions has, or an argument.
    Unknown,
}

/// A call of a function's.
pub struct Call {
    pub from: usize,
    /// `None`: a jump at its end, which returns to its caller's.
    pub returns: Option<u64>,
    pub to: Callee,
}

pub struct Function {
    pub name: String,
    start: u64,
    size: u64,
}

impl Function {
    pub fn is_ours(&self) -> bool {
        self.name.starts_with("vmbed::")
            || self.name.starts_with("<vmbed::")
            || self.name.contains(" as vmbed::")
    }
}

pub struct Code<'a> {
    pub functions: Vec<Function>,
    by_start: HashMap<u64, usize>,
    /// What lies in the table of addresses.
    table: HashMap<u64, Option<Callee>>,
    sections: Vec<(u64, &'a [u8])>,
}

impl<'a> Code<'a> {
    pub fn of(file: &object::File<'a>) -> Self {
        let mut functions: Vec<_> = file
            .symbols()
            .filter(|s| s.kind() == SymbolKind::Text && s.size() > 0 && s.is_definition())
            .map(|s| {
                let name = addr2line::demangle_auto(s.name().unwrap_or_default().into(), None).into_owned();
                Function { name, start: s.address(), size: s.size() }
            })
            .collect();
        functions.sort_by_key(|function| function.start);
        functions.dedup_by_key(|function| function.start);
        let by_start: HashMap<_, _> = functions.iter().enumerate().map(|(i, f)| (f.start, i)).collect();
        let symbols = file.dynamic_symbol_table().expect("what it imports");
        let named =
            |index| imported(symbols.symbol_by_index(index).and_then(|s| s.name()).unwrap_or_default());
        let relocations = file.dynamic_relocations().expect("a table of addresses");
        let table = relocations
            .map(|(at, relocation)| match relocation.target() {
                RelocationTarget::Symbol(index) => (at, named(index)),
                _ => (at, by_start.get(&(relocation.addend() as u64)).map(|i| Callee::Function(*i))),
            })
            .collect();
        let text = file.sections().filter(|section| section.kind() == SectionKind::Text);
        let sections = text.map(|section| (section.address(), section.data().unwrap_or_default())).collect();
        Self { functions, by_start, table, sections }
    }

    fn bytes(&self, at: u64, size: u64) -> &'a [u8] {
        let holds = |(start, data): &&(u64, &[u8])| (*start..start + data.len() as u64).contains(&at);
        let Some((start, data)) = self.sections.iter().find(holds) else { return &[] };
        let data = &data[(at - start) as usize..];
        &data[..data.len().min(size as usize)]
    }

    /// What is at that address: a function, or the linker's jump to one that is imported.
    fn near(&self, at: u64) -> Option<Callee> {
        if let Some(index) = self.by_start.get(&at) {
            return Some(Callee::Function(*index));
        }
        let mut code = Decoder::with_ip(64, self.bytes(at, 16), at, DecoderOptions::NONE);
        self.far(&code.iter().take(2).find(|i| i.is_ip_rel_memory_operand())?)
    }

    fn far(&self, instruction: &Instruction) -> Option<Callee> {
        let at = instruction.is_ip_rel_memory_operand().then(|| instruction.ip_rel_memory_address())?;
        self.table.get(&at).cloned().flatten()
    }

    pub fn calls(&self) -> Vec<Call> {
        let (mut calls, mut info) = (Vec::new(), InstructionInfoFactory::new());
        for (from, function) in self.functions.iter().enumerate() {
            let code = self.bytes(function.start, function.size);
            // What it keeps in registers to call it several times, as in a loop.
            let (mut kept, mut any) =
                (HashMap::<Register, Callee>::new(), HashMap::<Register, Callee>::new());
            for i in &mut Decoder::with_ip(64, code, function.start, DecoderOptions::NONE) {
                let elsewhere = |to: &Callee| *to != Callee::Function(from);
                let (to, returns) = match i.flow_control() {
                    _ if i.mnemonic() == Mnemonic::Syscall => (Some(Callee::Kernel), true),
                    FlowControl::Call => (self.near(i.near_branch_target()), true),
                    FlowControl::IndirectCall if i.op0_kind() == OpKind::Register => {
                        // What another branch has put there since may not be what is there.
                        let register = i.op0_register();
                        let found = kept.get(&register).or(any.get(&register)).cloned();
                        (found.or(Some(Callee::Unknown)), true)
                    }
                    FlowControl::IndirectCall if i.is_ip_rel_memory_operand() => (self.far(&i), true),
                    FlowControl::IndirectCall => (Some(Callee::Unknown), true),
                    FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                        let at = i.near_branch_target();
                        let inside = (function.start..function.start + function.size).contains(&at);
                        ((!inside).then(|| self.near(at)).flatten().filter(elsewhere), false)
                    }
                    FlowControl::IndirectBranch => (self.far(&i), false),
                    _ => (None, false),
                };
                calls.extend(to.map(|to| Call { from, returns: returns.then(|| i.next_ip()), to }));
                if let (OpKind::Register, OpAccess::Write | OpAccess::ReadWrite) =
                    (i.op0_kind(), info.info(&i).op0_access())
                {
                    let loaded = (i.mnemonic() == Mnemonic::Mov).then(|| self.far(&i)).flatten();
                    kept.remove(&i.op0_register().full_register());
                    any.extend(loaded.clone().map(|to| (i.op0_register(), to)));
                    kept.extend(loaded.map(|to| (i.op0_register(), to)));
                }
            }
        }
        calls
    }
}

fn imported(name: &str) -> Option<Callee> {
    let quiet = name.is_empty() || name == "close" || QUIET.iter().any(|start| name.starts_with(start));
    (!quiet || LOUD.contains(&name)).then_some(Callee::Kernel)
}
