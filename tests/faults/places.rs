//! Every place in src that calls the kernel, by itself or through code of others: read off this program's machine code.
//!
//! A place is a line of src with a call in it that leads to one of the C library's functions that are system calls (or to the
//! instruction itself), through no other line of src. What is called through a table of functions, as of a trait object, is a place
//! where that function itself is of src.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::path::Path;

use addr2line::Loader;
use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};
use object::{
    Object, ObjectSection, ObjectSymbol, ObjectSymbolTable, RelocationTarget, SectionKind, SymbolKind,
};

/// What the C library does without the kernel, or by calls that the supervisor lets pass (`PASSED`); the beginnings of their names.
const QUIET: [&str; 39] = [
    "_Unwind_",
    "__cxa_",
    "__errno_location",
    "__libc_start_main",
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

/// Parts of the names of others' functions that call the kernel for what is no concern of whoever calls them: the allocator, locks, panics, what is
/// printed, a random seed, a file that is closed (the standard library asks first whether it is open, in tests).
const CUT: [&str; 15] = [
    "OwnedFd",
    "parking_lot",
    "::park",
    "panic",
    "alloc::",
    "__rust",
    "rust_begin_unwind",
    "_failed",
    "sync::",
    "futex",
    "hashmap_random_keys",
    "backtrace",
    "fmt",
    "stdio",
    "std::rt",
];

#[derive(Clone, PartialEq)]
enum Callee {
    Function(usize),
    /// A system call of the C library's.
    Kernel,
}

/// A call of a function's.
struct Call {
    from: usize,
    /// `None`: a jump at its end, which returns to its caller's.
    returns: Option<u64>,
    to: Callee,
}

struct Function {
    name: String,
    start: u64,
    size: u64,
}

impl Function {
    fn is_ours(&self) -> bool {
        self.name.starts_with("vmbed::")
            || self.name.starts_with("<vmbed::")
            || self.name.contains(" as vmbed::")
    }
}

/// A line of src with a call of the kernel in it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// `sys/file.rs`
    pub file: String,
    pub line: u32,
    /// The function's own name.
    pub function: String,
}

pub struct Places {
    pub all: Vec<Place>,
    /// Where calls return to, as the program's file has it, with the number of the place.
    pub returns: BTreeMap<u64, usize>,
}

impl Places {
    pub fn of_this_program() -> Self {
        let path = std::env::current_exe().expect("this program");
        let data = std::fs::read(&path).expect("this program's file");
        let file = object::File::parse(&*data).expect("an ELF file");
        let code = Code::of(&file);
        let loader = Loader::new(&path).expect("this program's debug information");
        let calls: Vec<_> = code
            .calls()
            .into_iter()
            .filter(|call| call.to != Callee::Kernel || !closes(&loader, call))
            .collect();
        let is_cut = |f: &Function| !f.is_ours() && CUT.iter().any(|part| f.name.contains(part));
        let cut: HashSet<usize> = (0..code.functions.len()).filter(|i| is_cut(&code.functions[*i])).collect();
        // First without regard to whose line a call stands in: which may lead to the kernel at all.
        let may = closure(&calls, &cut, |_| true);
        let leads = |call: &Call, those: &HashSet<usize>| match &call.to {
            Callee::Kernel => true,
            Callee::Function(index) => those.contains(index),
        };
        let mut place_of = HashMap::new();
        for call in calls.iter().filter(|call| leads(call, &may)) {
            if let Some((returns, place)) = call.returns.and_then(|at| Some((at, place(&loader, at)?))) {
                place_of.insert(returns, place);
            }
        }
        // Then by others' lines alone. A function of ours that ends with a jump has no line that the kernel returns to.
        let passes_on = |call: &Call| match call.returns {
            Some(returns) => !place_of.contains_key(&returns) && !code.functions[call.from].is_ours(),
            None => true,
        };
        let does = closure(&calls, &cut, passes_on);
        let mut found = BTreeMap::new();
        for call in calls.iter().filter(|call| leads(call, &does) && !cut.contains(&call.from)) {
            if let Some((returns, place)) = call.returns.and_then(|at| Some((at, place_of.get(&at)?))) {
                found.insert(returns, place.clone());
            }
        }
        let mut all: Vec<Place> = found.values().cloned().collect();
        all.sort();
        all.dedup();
        let number = |place: &Place| all.binary_search(place).expect("it is among them");
        let returns = found.iter().map(|(returns, place)| (*returns, number(place))).collect();
        Self { all, returns }
    }

    /// As the children read it: addresses in their order, with numbers from 1.
    pub fn text(&self) -> String {
        self.returns.iter().map(|(returns, place)| format!("{returns} {}\n", place + 1)).collect()
    }

    /// What a number of theirs means.
    pub fn name(&self, number: u32) -> String {
        let place = (number as usize).checked_sub(1).and_then(|index| self.all.get(index));
        place.map_or("anywhere".into(), |place| place.to_string())
    }

    /// Those that are not among the numbers.
    pub fn unreached<'a>(&'a self, numbers: &'a BTreeSet<u32>) -> impl Iterator<Item = &'a Place> {
        let numbered = self.all.iter().zip(1u32..);
        numbered.filter(|(_, number)| !numbers.contains(number)).map(|(place, _)| place)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} ({})", self.file, self.line, self.function)
    }
}

/// Functions from which a call leads to the kernel, by calls that pass it on and not through those that are cut.
fn closure(calls: &[Call], cut: &HashSet<usize>, passes_on: impl Fn(&Call) -> bool) -> HashSet<usize> {
    let mut callers: HashMap<usize, Vec<usize>> = HashMap::new();
    let (mut found, mut open) = (HashSet::new(), Vec::new());
    let mut reach = |function: usize, open: &mut Vec<usize>| {
        if !cut.contains(&function) && found.insert(function) {
            open.push(function);
        }
    };
    for call in calls.iter().filter(|call| passes_on(call)) {
        match call.to {
            Callee::Kernel => reach(call.from, &mut open),
            Callee::Function(to) => callers.entry(to).or_default().push(call.from),
        }
    }
    while let Some(function) = open.pop() {
        callers.remove(&function).into_iter().flatten().for_each(|caller| reach(caller, &mut open));
    }
    found
}

/// Whether it stands in the end of a file, which has become a part of the function around it.
fn closes(loader: &Loader, call: &Call) -> bool {
    let Some(mut frames) = call.returns.and_then(|at| loader.find_frames(at - 1).ok()) else { return false };
    while let Ok(Some(frame)) = frames.next() {
        if frame.function.is_some_and(|name| {
            name.demangle().is_ok_and(|name| name.contains("OwnedFd") && name.contains("drop"))
        }) {
            return true;
        }
    }
    false
}

/// The innermost line of src that a call stands in.
fn place(loader: &Loader, returns: u64) -> Option<Place> {
    let mut frames = loader.find_frames(returns - 1).ok()?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    while let Ok(Some(frame)) = frames.next() {
        let Some(location) = frame.location else { continue };
        let Some(file) = location.file.map(Path::new).and_then(|file| file.strip_prefix(&source).ok()) else {
            continue;
        };
        let name =
            frame.function.and_then(|name| Some(name.demangle().ok()?.into_owned())).unwrap_or_default();
        return Some(Place {
            file: file.to_str()?.to_owned(),
            line: location.line.unwrap_or(0),
            function: own_name(&name),
        });
    }
    None
}

/// A function's own name, and of a closure that of the function around it.
fn own_name(path: &str) -> String {
    let is_name = |part: &&str| !(part.starts_with('{') || part.len() == 17 && part.starts_with('h'));
    path.split("::").filter(is_name).last().unwrap_or(path).to_owned()
}

/// This program's machine code.
struct Code<'a> {
    functions: Vec<Function>,
    by_start: HashMap<u64, usize>,
    /// What lies in the table of addresses.
    table: HashMap<u64, Option<Callee>>,
    sections: Vec<(u64, &'a [u8])>,
}

impl<'a> Code<'a> {
    fn of(file: &object::File<'a>) -> Self {
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

    fn calls(&self) -> Vec<Call> {
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
                        (kept.get(&register).or(any.get(&register)).cloned(), true)
                    }
                    FlowControl::IndirectCall => (self.far(&i), true),
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
