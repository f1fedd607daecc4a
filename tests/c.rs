//! The C ABI as a C program meets it: installed with `make install`, found with pkg-config, linked both ways.
//!
//! `cargo test --test c -- NAME` runs one case of `tests/c/api.c`; valgrind runs those that do not count memory.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use libtest_mimic::{Arguments, Trial};

#[path = "c/abi.rs"]
mod abi;
#[path = "c/generate.rs"]
mod generate;
#[path = "guests/mod.rs"]
mod guests;
#[path = "api/list.rs"]
mod list;

/// The program of the cases.
const API: [&str; 15] = [
    "tests/c/api.c",
    "tests/c/races.c",
    "tests/c/callbacks.c",
    "tests/c/drive.c",
    "tests/c/backends.c",
    "tests/c/switch.c",
    "tests/c/disks.c",
    "tests/c/wiring.c",
    "tests/c/memory.c",
    "tests/c/reclaim.c",
    "tests/c/hostile.c",
    "tests/c/lies.c",
    "tests/c/failing.c",
    "tests/c/host.c",
    "tests/c/sandbox.c",
];
const WARNINGS: [&str; 5] = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"];

fn main() -> std::process::ExitCode {
    let arguments = Arguments::from_args();
    let stage = Stage::make();
    let mut trials = vec![trial("listed_here_and_there", listed)];
    trials.extend(list::listed("c").into_iter().map(|name| trial(name, move |stage| case(stage, name))));
    trials.push(trial("wrong_arguments_of_every_function", wrong_arguments));
    trials.push(trial("abi_is_compatible", abi::compatible));
    trials.push(trial("abi_an_old_program_runs", abi::an_old_program_runs));
    trials.push(trial("valgrind", valgrind));
    trials.push(trial("sanitizers", sanitizers));
    trials.push(trial("example_bare", |stage| {
        assert_eq!(text(run(stage.program("bare", &[]).as_mut())), "hi\n");
    }));
    trials.push(trial("example_bare_static", |stage| {
        assert_eq!(text(run(stage.program("bare_static", &[]).as_mut())), "hi\n");
    }));
    trials.push(trial("example_many", |stage| {
        let said = text(run(stage.program("many", &[]).as_mut()));
        assert!(
            said.contains("254 halted, 1 took a triple fault, 1 was refused, 0 ended otherwise"),
            "{said}"
        );
    }));
    trials.push(trial("example_boot_says_what_is_wrong", boot_errors));
    trials.push(trial("nothing_else_is_exported", exported));
    let trials = trials.into_iter().map(|(name, run)| {
        let stage = stage.clone();
        Trial::test(name, move || {
            run(&stage);
            Ok(())
        })
    });
    let code = libtest_mimic::run(&arguments, trials.collect()).exit_code();
    let _ = std::fs::remove_dir_all(&stage.directory);
    code
}

type Run = Box<dyn FnOnce(&Stage) + Send>;

fn trial(name: &str, run: impl FnOnce(&Stage) + Send + 'static) -> (String, Run) {
    (name.to_owned(), Box::new(run))
}

/// An installation, and the programs built against it.
#[derive(Clone)]
struct Stage {
    directory: PathBuf,
    /// What pkg-config answers.
    flags: Vec<String>,
    /// The guest for disks and cards.
    guest: PathBuf,
    /// The one that breaks the rules.
    hostile: PathBuf,
}

impl Stage {
    fn make() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let directory = std::env::temp_dir().join(format!("vmbed-c-{}", std::process::id()));
        let mut stage = Self { directory, flags: Vec::new(), guest: PathBuf::new(), hostile: PathBuf::new() };
        let mut make = Command::new("make");
        make.current_dir(root).args(["--silent", "install", "PREFIX=/usr", "PROFILE=debug"]);
        make.arg(format!("DESTDIR={}", stage.directory.display()));
        // Not the jobserver and flags of a make that runs these tests.
        run(make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL"));
        let config = |options: &[&str]| {
            let mut command = Command::new("pkg-config");
            command.env("PKG_CONFIG_PATH", stage.directory.join("usr/lib/pkgconfig"));
            command.env("PKG_CONFIG_SYSROOT_DIR", &stage.directory).args(options).arg("vmbed");
            text(run(&mut command)).split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let flags = config(&["--cflags", "--libs"]);
        // The introduction's program, and README's, which is the same.
        let program = introduction();
        let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
        assert!(readme.contains(&program), "README's C program is not the header's");
        std::fs::write(stage.directory.join("introduction.c"), program).unwrap();
        let mut cc = Command::new("cc");
        cc.args(WARNINGS).arg(stage.directory.join("introduction.c")).arg("-o");
        run(cc.arg(stage.directory.join("introduction")).args(&flags));
        let page = std::fs::read_to_string(root.join("docs/networking.md")).unwrap();
        let programs: Vec<_> =
            page.split("```c\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
        assert!(programs.len() > 14, "it has lines in C");
        for (i, program) in programs.into_iter().enumerate() {
            let name = format!("networking-{i}.c");
            std::fs::write(stage.directory.join(&name), program).unwrap();
            let mut cc = Command::new("cc");
            cc.current_dir(&stage.directory).args(WARNINGS).args(["-c", &name]);
            run(cc.args(config(&["--cflags"])));
        }
        for name in ["bare", "many", "boot"] {
            stage.compile(name, &[&format!("examples/c/{name}.c")], &[], &flags);
        }
        stage.compile("api", &API, &[], &flags);
        let mut cc = Command::new("cc");
        cc.current_dir(root).args(WARNINGS).args(["examples/c/bare.c", "-o"]);
        cc.arg(stage.directory.join("bare_static")).args(config(&["--cflags"]));
        let libraries = config(&["--static", "--libs-only-l"]).into_iter().filter(|l| l != "-lvmbed");
        run(cc.arg(stage.directory.join("usr/lib/libvmbed.a")).args(libraries));
        stage.flags = flags;
        stage.guest = guests::virtio(&stage.directory);
        stage.hostile = guests::hostile(&stage.directory);
        stage
    }

    /// Makes a program of sources of this tree.
    fn compile(&self, name: &str, sources: &[&str], options: &[&str], libraries: &[String]) {
        let mut cc = Command::new("cc");
        cc.current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(WARNINGS)
            .args(["-O1", "-g", "-pthread"])
            .args(options);
        run(cc.args(sources).arg("-o").arg(self.directory.join(name)).args(libraries));
    }

    fn program(&self, name: &str, arguments: &[&str]) -> Box<Command> {
        // An alarm of its own may not reach a program that a leak checker has stopped.
        let mut command = Command::new("timeout");
        command.args(["--signal=KILL", "330"]).arg(self.directory.join(name));
        command.env("LD_LIBRARY_PATH", self.directory.join("usr/lib")).args(arguments);
        // What a program that is killed leaves behind lies there, and goes with it.
        command.env("VMBED_GUEST", &self.guest).env("VMBED_HOSTILE_GUEST", &self.hostile);
        command.current_dir(&self.directory);
        Box::new(command)
    }
}

/// Runs a command that must succeed.
fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?} cannot be started: {e}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{}{said}", output.status, text_of(&output));
    output
}

fn text_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn text(output: Output) -> String {
    text_of(&output)
}

fn listed(stage: &Stage) {
    let listed = text(run(stage.program("api", &["--list"]).as_mut()));
    list::compare("c", &listed.lines().collect::<Vec<_>>());
}

fn case(stage: &Stage, name: &str) {
    let said = text(run(stage.program("api", &[name]).as_mut()));
    assert_eq!(said, format!("ok {name}\n"));
}

/// Every function of the header with NULL in each place for a pointer, numbers beyond each enumeration, and
/// structures that are too short or say more than is known: an error each time, and the program goes on.
fn wrong_arguments(stage: &Stage) {
    let (source, calls) = generate::wrong_arguments(&header());
    std::fs::write(stage.directory.join("wrong.c"), source).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-std=gnu11", "-Wall", "-Wno-nonnull", "-O1", "-g"]).arg(stage.directory.join("wrong.c"));
    cc.arg("-I").arg(stage.directory.join("usr/include")).arg("-o").arg(stage.directory.join("wrong"));
    run(cc.arg(stage.directory.join("usr/lib/libvmbed.so")));
    let said = text(run(stage.program("wrong", &[]).as_mut()));
    assert_eq!(said, format!("{calls} calls\n"));
    assert!(calls > 200, "{calls}");
}

/// The program on the header's first page.
fn introduction() -> String {
    let lines = include_str!("../src/capi/introduction.h").lines().filter_map(|l| {
        let line = l.strip_prefix(" *").unwrap_or(l);
        line.strip_prefix("     ").or(line.is_empty().then_some(line))
    });
    let text = lines.collect::<Vec<_>>().join("\n");
    let start = text.find("#include").unwrap();
    text[start..].trim_end().to_owned() + "\n"
}

fn header() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("include/vmbed.h")).unwrap()
}

/// Cases that count memory or descriptors (valgrind has some of its own), wait for long, fork, have more threads than valgrind has patience
/// for, or one that stays, or make calls that valgrind does not know.
const NOT_FOR_VALGRIND: [&str; 7] = [
    "a_sandbox_for_its_threads",
    "cycles_leave_nothing",
    "a_callback_that_blocks",
    "a_fork_while_a_vm_runs",
    "many_at_once",
    "memory_that_is_lost",
    "too_few_descriptors_and_a_storm",
];

/// No error, no leak, no fd left.
fn valgrind(stage: &Stage) {
    for name in list::listed("c").iter().filter(|name| !NOT_FOR_VALGRIND.contains(name)) {
        let mut command = Command::new("timeout");
        command.args([
            "--signal=KILL",
            "330",
            "valgrind",
            "-q",
            "--error-exitcode=99",
            "--leak-check=full",
            "--track-fds=yes",
        ]);
        // Possible losses are thread-local storage of threads that end while the program does.
        command.args(["--errors-for-leak-kinds=definite,indirect"]).arg(stage.directory.join("api"));
        command.current_dir(&stage.directory);
        command.env("LD_LIBRARY_PATH", stage.directory.join("usr/lib")).env("VMBED_ROUNDS", "100");
        command.env("VMBED_GUEST", &stage.guest).env("VMBED_HOSTILE_GUEST", &stage.hostile);
        let output = run(command.arg(name));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("Open file descriptor") || inherited(&said), "{name}: {said}");
    }
}

/// The cases with the compiler's sanitizers in the C half, and their allocator and leak check under both halves.
fn sanitizers(stage: &Stage) {
    let options = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"];
    stage.compile("api-sanitized", &API, &options, &stage.flags);
    // What memory a process keeps is the allocator's business, and that is another one here. After a fork this one's
    // locks may be held for ever by threads that the child has not (gcc 12).
    let unfit = ["cycles_leave_nothing", "a_fork_while_a_vm_runs"];
    for name in list::listed("c").iter().filter(|name| !unfit.contains(name)) {
        let mut command = stage.program("api-sanitized", &[name]);
        command.env("ASAN_OPTIONS", "detect_leaks=1:strict_string_checks=1").env("VMBED_ROUNDS", "1000");
        assert_eq!(text(run(&mut command)), format!("ok {name}\n"));
    }
}

/// Whether every descriptor that is open at the end was open at the start.
fn inherited(said: &str) -> bool {
    let open = said.matches("Open file descriptor").count();
    open == said.matches("<inherited from parent>").count()
}

fn boot_errors(stage: &Stage) {
    let output = stage.program("boot", &["--kernel", "/nonexistent", "--vcpus", "0"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cpus.count"), "{output:?}");
    let output = stage.program("boot", &["--kernel", "/nonexistent"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("'/nonexistent'"), "{output:?}");
    assert!(text(run(stage.program("boot", &["--help"]).as_mut())).starts_with("usage: boot"));
}

fn exported(stage: &Stage) {
    let mut nm = Command::new("nm");
    nm.args(["-D", "--defined-only"]).arg(stage.directory.join("usr/lib/libvmbed.so"));
    let symbols = text(run(&mut nm));
    let names: Vec<_> = symbols.lines().filter_map(|l| l.split_whitespace().last()).collect();
    assert!(names.iter().all(|name| name.starts_with("vmbed_")), "{names:?}");
    let header = header();
    for name in &names {
        assert!(header.contains(&format!("{name}(")), "{name} is not in the header");
    }
    assert!(names.len() > 60, "{names:?}");
}
