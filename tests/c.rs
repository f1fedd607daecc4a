//! The C ABI as a C program meets it: installed with `make install`, found with pkg-config, linked both ways.
//!
//! `cargo test --test c -- NAME` runs one case of `tests/c/api.c`; valgrind runs those that do not count memory.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use libtest_mimic::{Arguments, Trial};

#[path = "c/generate.rs"]
mod generate;

/// The cases of `tests/c/api.c`, which says them too: one that is missing there or here fails.
const CASES: [&str; 15] = [
    "guest_and_device",
    "events_in_order",
    "registers_and_memory",
    "structure_sizes",
    "every_bad_field_at_once",
    "what_is_promised_and_what_is_there",
    "data_are_destroyed_once",
    "a_device_that_fails_is_the_cause",
    "a_callback_stops_its_vm",
    "a_callback_frees_its_vm",
    "free_races_with_everything",
    "callbacks_that_are_missing",
    "log_lines_go_where_they_are_wanted",
    "version_and_features",
    "cycles_leave_nothing",
];
const WARNINGS: [&str; 5] = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"];

fn main() -> std::process::ExitCode {
    let arguments = Arguments::from_args();
    let stage = Stage::make();
    let mut trials = vec![trial("listed_here_and_there", listed)];
    trials.extend(CASES.map(|name| trial(name, move |stage| case(stage, name))));
    trials.push(trial("wrong_arguments_of_every_function", wrong_arguments));
    trials.push(trial("valgrind", valgrind));
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
}

impl Stage {
    fn make() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let directory = std::env::temp_dir().join(format!("vmbed-c-{}", std::process::id()));
        let stage = Self { directory };
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
        for source in ["examples/c/bare", "examples/c/many", "examples/c/boot", "tests/c/api"] {
            let name = source.rsplit('/').next().unwrap();
            let mut cc = Command::new("cc");
            cc.current_dir(root).args(WARNINGS).args(["-O1", "-g", "-pthread", &format!("{source}.c"), "-o"]);
            run(cc.arg(stage.directory.join(name)).args(&flags));
        }
        let mut cc = Command::new("cc");
        cc.current_dir(root).args(WARNINGS).args(["examples/c/bare.c", "-o"]);
        cc.arg(stage.directory.join("bare_static")).args(config(&["--cflags"]));
        let libraries = config(&["--static", "--libs-only-l"]).into_iter().filter(|l| l != "-lvmbed");
        run(cc.arg(stage.directory.join("usr/lib/libvmbed.a")).args(libraries));
        stage
    }

    fn program(&self, name: &str, arguments: &[&str]) -> Box<Command> {
        let mut command = Command::new(self.directory.join(name));
        command.env("LD_LIBRARY_PATH", self.directory.join("usr/lib")).args(arguments);
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
    assert_eq!(listed.lines().collect::<Vec<_>>(), CASES);
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

/// No error, no leak, no fd left.
fn valgrind(stage: &Stage) {
    for name in CASES.iter().filter(|name| **name != "cycles_leave_nothing") {
        let mut command = Command::new("valgrind");
        command.args(["-q", "--error-exitcode=99", "--leak-check=full", "--track-fds=yes"]);
        // Possible losses are thread-local storage of threads that end while the program does.
        command.args(["--errors-for-leak-kinds=definite,indirect"]).arg(stage.directory.join("api"));
        let output = run(command.env("LD_LIBRARY_PATH", stage.directory.join("usr/lib")).arg(name));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("Open file descriptor") || inherited(&said), "{name}: {said}");
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
