#![forbid(unsafe_code)]
//! The macros of the crate `log`, for threads that may be in a sandbox: the embedder's logger never runs there, another
//! thread hands it their records. Use this module by its name, and `log::warn!` is what it was.

use std::cell::RefCell;
use std::fmt;

use ::log::{Level, Record};

/// Takes a record from the calling thread to where the logger may run.
type Carrier = Box<dyn Fn(Entry)>;

thread_local! {
    /// `None` on threads that call the logger themselves.
    static CARRIER: RefCell<Option<Carrier>> = const { RefCell::new(None) };
}

/// A record that waits for its logger.
pub(crate) struct Entry {
    level: Level,
    module: &'static str,
    text: String,
}

impl Entry {
    /// Hands it to the embedder's logger.
    pub fn write(&self) {
        hand(self.level, self.module, format_args!("{}", self.text));
    }
}

/// From now on the calling thread's records go that way.
pub(crate) fn divert(carrier: impl Fn(Entry) + 'static) {
    CARRIER.set(Some(Box::new(carrier)));
}

pub(crate) fn record(level: Level, module: &'static str, text: fmt::Arguments<'_>) {
    if level > ::log::max_level() {
        return;
    }
    // The thread's own variables may be gone: at its end nothing is worth more.
    let _ = CARRIER.try_with(|carrier| match &*carrier.borrow() {
        Some(carry) => carry(Entry { level, module, text: text.to_string() }),
        None => hand(level, module, text),
    });
}

fn hand(level: Level, module: &'static str, text: fmt::Arguments<'_>) {
    let mut record = Record::builder();
    record.level(level).target(module).module_path_static(Some(module));
    ::log::logger().log(&record.args(text).build());
}

macro_rules! make {
    ($($name:ident $own:ident $level:ident),*; $dollar:tt) => { $(
        macro_rules! $own {
            ($dollar($dollar arg:tt)+) => {
                $crate::sys::log::record(::log::Level::$level, module_path!(), format_args!($dollar($dollar arg)+))
            };
        }
        pub(crate) use $own as $name;
    )* };
}

make!(error error_record Error, warn warn_record Warn, debug debug_record Debug, trace trace_record Trace; $);

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_record_goes_where_its_thread_sends_it() {
        let (to, from) = channel();
        let before = ::log::max_level();
        ::log::set_max_level(::log::LevelFilter::Warn);
        std::thread::spawn(move || {
            divert(move |entry| to.send((entry.level, entry.module, entry.text)).unwrap());
            warn!("{} of {}", 1, 2);
            debug!("nobody wants to know");
        })
        .join()
        .unwrap();
        ::log::set_max_level(before);
        let all: Vec<_> = from.iter().collect();
        assert_eq!(all, [(Level::Warn, "vmbed::sys::log::tests", "1 of 2".to_owned())]);
    }
}
