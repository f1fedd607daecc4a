#![forbid(unsafe_code)]
//! What the policy saw and what it wanted done, on a line: so that a log is a scenario, and a scenario can be played again.

use std::fmt;

use super::{Sample, Standing, Step, Thresholds, VmSample};

/// One look at the host: numbers in bytes, times in seconds.
pub(crate) struct Look<'a> {
    pub limits: &'a Thresholds,
    pub sample: &'a Sample,
    pub steps: &'a [Step],
}

impl fmt::Display for Look<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Thresholds { balloon, page_out, pause, stop, tax, deadline } = self.limits;
        write!(f, "limits balloon={balloon} page_out={page_out} pause={pause} stop={stop} tax={tax} ")?;
        let Sample { now, free, swap, vms } = self.sample;
        write!(f, "deadline={} | host now={} ", deadline.as_secs_f64(), now.as_secs_f64())?;
        write!(f, "free={free} swap={swap} |")?;
        for vm in vms {
            let VmSample { id, max, guarantee, resident, idle, asked, ballooned, .. } = vm;
            write!(f, " vm={id} max={max} guarantee={guarantee} resident={resident} idle={idle} ")?;
            write!(f, "asked={asked} ballooned={ballooned} needs_all={} ", u8::from(vm.needs_all))?;
            let until = |until: std::time::Duration| format!("paused:{}", until.as_secs_f64());
            let standing = match vm.standing {
                Standing::Running => "running".to_owned(),
                Standing::Paused { until: at } => until(at),
                Standing::Other => "other".to_owned(),
            };
            let victim = vm.victim.map_or("never".to_owned(), |class| class.to_string());
            write!(f, "victim={victim} standing={standing} ;")?;
        }
        f.write_str(" |")?;
        self.steps.iter().try_for_each(|step| match *step {
            Step::Balloon { vm, target } => write!(f, " balloon:{vm}:{target}"),
            Step::PageOut { vm, bytes } => write!(f, " page_out:{vm}:{bytes}"),
            Step::Pause { vm, until } => write!(f, " pause:{vm}:{}", until.as_secs_f64()),
            Step::Resume { vm } => write!(f, " resume:{vm}"),
            Step::Stop { vm } => write!(f, " stop:{vm}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::super::plan;
    use super::*;

    fn words(text: &str) -> BTreeMap<&str, &str> {
        text.split_whitespace().filter_map(|word| word.split_once('=')).collect()
    }

    fn bytes(words: &BTreeMap<&str, &str>, key: &str) -> u64 {
        words[key].parse().unwrap_or_else(|e| panic!("{key}: {e} in {words:?}"))
    }

    fn time(text: &str) -> Duration {
        Duration::from_secs_f64(text.parse().unwrap())
    }

    fn vm(text: &str) -> VmSample {
        let words = words(text);
        let of = |key| bytes(&words, key);
        let standing = match words["standing"] {
            "running" => Standing::Running,
            "other" => Standing::Other,
            paused => Standing::Paused { until: time(paused.strip_prefix("paused:").unwrap()) },
        };
        VmSample {
            id: of("vm"),
            max: of("max"),
            guarantee: of("guarantee"),
            resident: of("resident"),
            idle: of("idle"),
            asked: of("asked"),
            ballooned: of("ballooned"),
            needs_all: of("needs_all") == 1,
            victim: words["victim"].parse().ok(),
            standing,
        }
    }

    /// The limits, the sample, and what was to be done, as it was written.
    fn parsed(line: &str) -> (Thresholds, Sample, &str) {
        let parts: Vec<_> = line.split('|').collect();
        let [limits, host, vms, steps] = parts[..] else { panic!("{line}") };
        let (limits, host) = (words(limits), words(host));
        let of = |key| bytes(&limits, key);
        let thresholds = Thresholds {
            balloon: of("balloon"),
            page_out: of("page_out"),
            pause: of("pause"),
            stop: of("stop"),
            tax: limits["tax"].parse().unwrap(),
            deadline: time(limits["deadline"]),
        };
        let vms = vms.split(';').filter(|vm| !vm.trim().is_empty()).map(vm).collect();
        let (free, swap) = (bytes(&host, "free"), bytes(&host, "swap"));
        (thresholds, Sample { now: time(host["now"]), free, swap, vms }, steps)
    }

    /// Which scenarios there are, each written by a host that had too little memory: storms of `tests/linux/storm.rs` and
    /// the demonstration, in the lab.
    const RECORDED: [(&str, &str); 3] = [
        ("storm with swap", include_str!("../../../tests/recorded/storm-with-swap")),
        ("storm without swap", include_str!("../../../tests/recorded/storm-without-swap")),
        ("demo-overcommit", include_str!("../../../tests/recorded/demo-overcommit")),
    ];

    #[test]
    fn recorded_hosts_are_answered_as_they_were() {
        // Miri takes a thousand times as long.
        let most = if cfg!(miri) { 2 } else { usize::MAX };
        for (name, recorded) in RECORDED {
            for line in recorded.lines().take(most) {
                let (limits, sample, wanted) = parsed(line);
                let steps = plan(&limits, &sample);
                let again = Look { limits: &limits, sample: &sample, steps: &steps }.to_string();
                assert_eq!(again.rsplit('|').next(), Some(wanted), "{name}: {line}");
                assert_eq!(again, line, "{name}: written as it was read");
            }
        }
    }

    /// What held over each scenario as a whole, whatever each step was.
    #[test]
    #[cfg_attr(miri, ignore = "only a whole scenario says anything, which is too long")]
    fn recorded_hosts_came_through() {
        for (name, recorded) in RECORDED {
            let (mut stopped, mut paused, mut met) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
            for line in recorded.lines() {
                let (limits, sample, steps) = parsed(line);
                for step in steps.split_whitespace() {
                    let parts: Vec<_> = step.split(':').collect();
                    let vm = sample.vms.iter().find(|vm| vm.id == parts[1].parse::<u64>().unwrap()).unwrap();
                    *met.entry(parts[0]).or_insert(0) += 1;
                    match parts[0] {
                        "balloon" => assert!(parts[2].parse::<u64>().unwrap() <= vm.max - vm.guarantee),
                        "page_out" => {
                            assert!(parts[2].parse::<u64>().unwrap() <= vm.resident - vm.guarantee)
                        }
                        "pause" => drop(paused.insert(vm.id, sample.now)),
                        "resume" => drop(paused.remove(&vm.id)),
                        _ => {
                            assert!(!stopped.contains(&vm.id), "{name}: twice");
                            stopped.push(vm.id);
                            // In the order that was declared.
                            let class = vm.victim.expect("only who may be");
                            assert!(sample.vms.iter().all(|other| other.victim.is_none_or(|c| c >= class)));
                            paused.remove(&vm.id);
                        }
                    }
                }
                // Nobody stands for longer than may be, and a look or two.
                paused.retain(|id, _| sample.vms.iter().any(|vm| vm.id == *id));
                let most = limits.deadline + Duration::from_secs(1);
                assert!(paused.values().all(|since| sample.now - *since <= most), "{name}: {line}");
            }
            let least: &[_] = match name {
                "storm with swap" => &["page_out"],
                "storm without swap" => &["pause", "stop"],
                _ => &["balloon"],
            };
            assert!(least.iter().all(|step| met.contains_key(step)), "{name}: {met:?}");
        }
    }
}
