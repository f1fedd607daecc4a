#![forbid(unsafe_code)]
//! For the project's tests: filters that let nothing through, a supervisor that has every call made, and what was seen. Behind the
//! feature `internals`.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use syscalls::Sysno;

use super::calls::{self, Rule};
use crate::sys::seccomp::Notice;
use crate::vm::Duty;

const MOST: usize = 128;

static ON: AtomicBool = AtomicBool::new(false);
/// By duty, and by the rule's place in its list.
static SEEN: [[AtomicBool; MOST]; calls::DUTIES.len()] =
    [const { [const { AtomicBool::new(false) }; MOST] }; calls::DUTIES.len()];
/// Calls that no rule covers: number and duty, and what they are told apart by.
static STRANGE: [[AtomicU64; 2]; MOST] = [const { [const { AtomicU64::new(0) }; 2] }; MOST];

/// From here on, VMs that are built learn.
pub fn begin() {
    ON.store(true, Ordering::SeqCst);
}

pub(super) fn is_on() -> bool {
    ON.load(Ordering::SeqCst)
}

/// What must pass before anybody listens: a thread says with it that it has entered.
pub(super) fn rules() -> impl Iterator<Item = &'static Rule> {
    calls::EVERY.iter().filter(|rule| rule.call == Sysno::futex)
}

/// Allocates nothing.
pub(super) fn note(duty: Duty, notice: &Notice) {
    let mut covered = false;
    for (seen, rule) in SEEN[duty as usize].iter().zip(calls::of(duty)) {
        if rule.covers(notice) {
            seen.store(true, Ordering::SeqCst);
            covered = true;
        }
    }
    if covered {
        return;
    }
    let key = (notice.number as u64 + 1) | ((duty as u64) << 32);
    let [_, second, third, ..] = notice.arguments;
    let kind = match Sysno::new(notice.number as usize) {
        Some(Sysno::ioctl | Sysno::fcntl | Sysno::fallocate | Sysno::epoll_ctl) => second,
        Some(Sysno::mmap | Sysno::mprotect | Sysno::madvise | Sysno::tgkill) => third,
        _ => 0,
    };
    for [known, same] in &STRANGE {
        match known.compare_exchange(0, key, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => return same.store(kind, Ordering::SeqCst),
            Err(taken) if taken == key && same.load(Ordering::SeqCst) == kind => return,
            Err(_) => {}
        }
    }
}

fn told(duty: Duty, rule: &Rule) -> String {
    format!("{duty:?}: {} {:x?}", rule.call, rule.only)
}

/// The rules that no call has needed, without those that say why; what every thread may is seen where any does it.
pub fn unneeded() -> Vec<String> {
    let seen = |duty: Duty, at: usize| SEEN[duty as usize][at].load(Ordering::SeqCst);
    let mut found = Vec::new();
    for duty in calls::DUTIES {
        for (at, rule) in calls::of(duty).enumerate() {
            let shared = at < calls::EVERY.len();
            let any = calls::DUTIES.iter().any(|other| shared && seen(*other, at));
            if rule.unseen.is_none() && rule.call != Sysno::futex && !seen(duty, at) && !any {
                found.push(told(duty, rule));
            }
        }
    }
    found.dedup();
    found
}

/// The rules that say why no run shows them, and that one has.
pub fn shown() -> Vec<String> {
    let mut found = Vec::new();
    for duty in calls::DUTIES {
        for (at, rule) in calls::of(duty).enumerate() {
            if rule.unseen.is_some() && SEEN[duty as usize][at].load(Ordering::SeqCst) {
                found.push(told(duty, rule));
            }
        }
    }
    found
}

/// What was called and is on no list.
pub fn unlisted() -> Vec<String> {
    let places = STRANGE.iter().map(|place| place.each_ref().map(|number| number.load(Ordering::SeqCst)));
    let all = places.filter(|[key, _]| *key > 0).map(|[key, kind]| {
        let (duty, number) = (calls::DUTIES[(key >> 32) as usize], (key as u32 - 1) as usize);
        format!("{duty:?}: {} {kind:#x}", Sysno::new(number).map_or("?", |call| call.name()))
    });
    all.collect()
}
