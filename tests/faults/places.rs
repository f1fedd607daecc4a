//! Every place in src that calls the kernel, by itself or through code of others: read off a program's machine code.
//!
//! A place is a line of src with a call in it that leads to one of the C library's functions that are system calls (or to the
//! instruction itself), through no other line of src. What is called through a table of functions, as of a trait object, is a place
//! where that function itself is of src.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::path::Path;

use addr2line::Loader;

use crate::callers::LOST;
use crate::code::{Call, Callee, Code, Function};

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

/// A line of src with a call of the kernel in it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// `sys/file.rs`
    pub file: String,
    pub line: u32,
    /// The function's own name.
    pub function: String,
}

pub struct Places {
    /// Those that lead to the kernel by what the code shows, in their order, and then every other line with a call.
    pub all: Vec<Place>,
    /// How many of them do.
    pub shown: usize,
    /// Where calls return to, as the program's file has it, with the number of the place.
    returns: BTreeMap<u64, u32>,
}

impl Places {
    pub fn of(path: &Path) -> Self {
        let data = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = object::File::parse(&*data).expect("an ELF file");
        let code = Code::of(&file);
        let loader = Loader::new(path).expect("its debug information");
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
            Callee::Unknown => false,
        };
        let is_ours = |call: &Call| code.functions[call.from].is_ours();
        let mut place_of = HashMap::new();
        for call in
            calls.iter().filter(|call| leads(call, &may) || call.to == Callee::Unknown || is_ours(call))
        {
            if let Some((returns, place)) = call.returns.and_then(|at| Some((at, place(&loader, at)?))) {
                place_of.insert(returns, place);
            }
        }
        // Then by others' lines alone. A function of ours that ends with a jump has no line that the kernel returns to.
        let passes_on = |call: &Call| match call.returns {
            Some(returns) => !place_of.contains_key(&returns) && !is_ours(call),
            None => true,
        };
        let does = closure(&calls, &cut, passes_on);
        let shows = |call: &&Call| leads(call, &does) && !cut.contains(&call.from);
        let shown: BTreeSet<&Place> =
            calls.iter().filter(shows).filter_map(|call| place_of.get(&call.returns?)).collect();
        let others: BTreeSet<&Place> = place_of.values().filter(|place| !shown.contains(place)).collect();
        let all: Vec<Place> = shown.iter().chain(&others).map(|place| (*place).clone()).collect();
        let numbers: HashMap<&Place, u32> = all.iter().zip(1..).collect();
        let returns = place_of.iter().map(|(returns, place)| (*returns, numbers[place])).collect();
        Self { shown: shown.len(), returns, all }
    }

    /// As the children read it: addresses in their order, with numbers from 1.
    pub fn text(&self) -> String {
        self.returns.iter().map(|(returns, place)| format!("{returns} {place}\n")).collect()
    }

    /// What a number of theirs means.
    pub fn name(&self, number: u32) -> String {
        if number == LOST {
            return "a stack that does not say".into();
        }
        let place = (number as usize).checked_sub(1).and_then(|index| self.all.get(index));
        place.map_or("anywhere".into(), |place| place.to_string())
    }

    /// Those that the code shows, and those that calls were seen to come from, with their numbers.
    pub fn known<'a>(&'a self, seen: &'a BTreeSet<u32>) -> impl Iterator<Item = (&'a Place, u32)> {
        let is_known = |number: u32| number as usize <= self.shown || seen.contains(&number);
        self.all.iter().zip(1u32..).filter(move |(_, number)| is_known(*number))
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
            Callee::Unknown => {}
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
