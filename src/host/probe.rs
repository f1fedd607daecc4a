#![forbid(unsafe_code)]
//! What this machine can and cannot do, and how to mend what it cannot.

use std::fmt;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

use crate::error::{Error, ErrorKind, Result};

/// What [`Host::probe`](crate::Host::probe) found.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Probe {
    /// Everything that was looked at, in the order in which it matters.
    pub findings: Vec<Finding>,
}

/// One thing that vmbed needs, or can use, and whether it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    /// Why it will not do; `None` when it will.
    pub problem: Option<String>,
    /// How to mend it; empty when there is nothing to mend.
    pub remedy: String,
    /// How a call that needs it fails.
    pub kind: ErrorKind,
    /// VMs can do without it: only one that asks for it fails.
    pub optional: bool,
}

/// Whether the processor walks guests' page tables itself: a module of KVM says so.
pub(super) fn nested_paging() -> bool {
    ["kvm_intel/parameters/ept", "kvm_amd/parameters/npt"].into_iter().any(|switch| {
        let text = std::fs::read_to_string(Path::new("/sys/module").join(switch)).unwrap_or_default();
        matches!(text.trim(), "Y" | "1")
    })
}

impl Probe {
    /// Whether VMs can be built here.
    pub fn is_usable(&self) -> bool {
        self.findings.iter().all(|f| f.optional || f.problem.is_none())
    }

    /// The first problem as the error that [`Host::open`](crate::Host::open) answers.
    ///
    /// # Errors
    /// That problem; `Ok` when there is none.
    pub fn verdict(&self) -> Result<()> {
        match self.findings.iter().filter(|f| !f.optional).find_map(|f| Some((f, f.problem.as_ref()?))) {
            None => Ok(()),
            Some((finding, problem)) => {
                let text = format!("{}: {problem}; {}", finding.what, finding.remedy);
                Err(Error::new(finding.kind, text))
            }
        }
    }

    fn add(&mut self, what: impl Into<String>, problem: Option<(ErrorKind, String, String)>) {
        let (what, optional) = (what.into(), false);
        self.findings.push(match problem {
            None => {
                Finding { what, problem: None, remedy: String::new(), kind: ErrorKind::Unsupported, optional }
            }
            Some((kind, problem, remedy)) => Finding { what, problem: Some(problem), remedy, kind, optional },
        });
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            match &finding.problem {
                None => writeln!(f, "ok       {}", finding.what)?,
                Some(problem) => {
                    let mark = if finding.optional { "without" } else { "MISSING" };
                    writeln!(f, "{mark}  {}: {problem}", finding.what)?;
                    writeln!(f, "         {}", finding.remedy)?;
                }
            }
        }
        Ok(())
    }
}

/// The only version of KVM's interface there has been since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;

/// What every VM needs of KVM, and the kernel that brought it.
const NEEDED: [(Cap, &str, &str); 10] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "2.6.25"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "2.6.26"),
    (Cap::MpState, "KVM_CAP_MP_STATE", "2.6.26"),
    (Cap::Irqfd, "KVM_CAP_IRQFD", "2.6.32"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", "2.6.32"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK", "2.6.33"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI", "3.5"),
    (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL", "3.5"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP", "4.5"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "4.13"),
];

/// Looks at the KVM device at `path`; hands it over when it will do.
pub(super) fn look(path: &Path) -> (Probe, Option<Kvm>) {
    let mut probe = Probe::default();
    let opened = open(path);
    let (kvm, problem) = match opened {
        Ok(kvm) => (Some(kvm), None),
        Err(problem) => (None, Some(problem)),
    };
    probe.add(format!("opening {}", path.display()), problem);
    if let Some(kvm) = &kvm {
        interface(&mut probe, kvm.get_api_version(), |cap| kvm.check_extension(cap));
    }
    let kvm = kvm.filter(|_| probe.is_usable());
    for (what, is_there, remedy) in crate::sandbox::parts() {
        let missing = (!is_there)
            .then(|| (ErrorKind::Unsupported, "this kernel lacks it".to_owned(), remedy.to_owned()));
        probe.add(what, missing);
        probe.findings.iter_mut().rev().take(1).for_each(|finding| finding.optional = true);
    }
    (probe, kvm)
}

fn open(path: &Path) -> std::result::Result<Kvm, (ErrorKind, String, String)> {
    let text = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| {
        (ErrorKind::InvalidArgument, "the path holds a NUL".to_owned(), "name a device".to_owned())
    })?;
    let opened = loop {
        match Kvm::new_with_path(&text) {
            Err(error) if error.errno() == libc::EINTR => {}
            opened => break opened,
        }
    };
    opened.map_err(|e| {
        let os = std::io::Error::from_raw_os_error(e.errno());
        let (kind, remedy) = match e.errno() {
            libc::ENOENT => (ErrorKind::NotFound, no_device()),
            libc::EACCES | libc::EPERM => (
                ErrorKind::PermissionDenied,
                format!(
                    "add the user to the group that owns {} (usermod -aG kvm USER), or grant it by ACL",
                    path.display()
                ),
            ),
            libc::ENODEV | libc::ENXIO => (ErrorKind::NotFound, no_device()),
            libc::EMFILE | libc::ENFILE => {
                (ErrorKind::Exhausted, "raise the limit of open files (ulimit -n)".to_owned())
            }
            _ => (ErrorKind::Os, "see the kernel's log (dmesg)".to_owned()),
        };
        (kind, os.to_string(), remedy)
    })
}

/// Why there is no KVM device here.
fn no_device() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has =
        |flag: &str| cpu.lines().any(|l| l.starts_with("flags") && l.split_whitespace().any(|f| f == flag));
    match (has("vmx"), has("svm"), has("hypervisor")) {
        (true, _, _) => "load the module: modprobe kvm_intel".to_owned(),
        (_, true, _) => "load the module: modprobe kvm_amd".to_owned(),
        (_, _, true) => {
            "this machine is itself a VM: have its hypervisor enable nested virtualization".to_owned()
        }
        _ => "enable VT-x or AMD-V (SVM) in the firmware's setup".to_owned(),
    }
}

fn interface(probe: &mut Probe, version: i32, has: impl Fn(Cap) -> bool) {
    let wrong = (version != KVM_API_VERSION).then(|| {
        let problem = format!("answers {version}");
        (ErrorKind::Unsupported, problem, "name the KVM device of a Linux kernel".to_owned())
    });
    let talks = wrong.is_none();
    probe.add(format!("KVM interface version {KVM_API_VERSION}"), wrong);
    for (cap, name, since) in NEEDED.into_iter().filter(|_| talks) {
        let missing = (!has(cap)).then(|| {
            let problem = "this kernel's KVM lacks it".to_owned();
            (ErrorKind::Unsupported, problem, format!("it came with Linux {since}: use a newer kernel"))
        });
        probe.add(name, missing);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kvm_too_old_is_told_what_and_since_when() {
        let mut probe = Probe::default();
        interface(&mut probe, 12, |cap| cap != Cap::SplitIrqchip);
        assert!(!probe.is_usable());
        let error = probe.verdict().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let text = error.to_string();
        assert!(text.contains("KVM_CAP_SPLIT_IRQCHIP") && text.contains("Linux 4.5"), "{text}");
        assert!(probe.to_string().contains("MISSING  KVM_CAP_SPLIT_IRQCHIP"), "{probe}");
    }

    #[test]
    fn what_is_not_kvm_is_told_so() {
        let (probe, kvm) = look(Path::new("/dev/null"));
        assert!(kvm.is_none());
        assert_eq!(probe.verdict().unwrap_err().kind(), ErrorKind::Unsupported);
        let (probe, _) = look(Path::new("/dev/no-such-kvm"));
        let error = probe.verdict().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("/dev/no-such-kvm"), "{error}");
    }
}
