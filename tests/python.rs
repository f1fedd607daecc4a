//! The Python package as a user gets it: installed with pip into an environment of its own, checked with mypy --strict,
//! and the API's cases through it (python/tests, the same as tests/api-cases).

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Trial};

#[path = "guests/mod.rs"]
mod guests;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if arguments.list {
        return libtest_mimic::run(&arguments, trials(PathBuf::new())).exit_code();
    }
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("python-{}", std::process::id()));
    let made = std::panic::catch_unwind(|| install(&home));
    let code = match made {
        Ok(()) => libtest_mimic::run(&arguments, trials(home.clone())).exit_code(),
        Err(_) => ExitCode::FAILURE,
    };
    let _ = std::fs::remove_dir_all(&home);
    code
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn trials(home: PathBuf) -> Vec<Trial> {
    let trial = |name: &str, run: fn(&Path)| {
        let home = home.clone();
        Trial::test(name, move || {
            run(&home);
            Ok(())
        })
    };
    vec![
        trial("types_are_strict", |home| {
            let python = home.join("bin/python");
            let mut mypy = Command::new(home.join("bin/mypy"));
            run(mypy.arg("--python-executable").arg(python).current_dir(root().join("python")));
        }),
        trial("cases", |home| {
            let mut pytest = Command::new(home.join("bin/pytest"));
            // 600 s: better an error than a hang.
            pytest.args(["-p", "no:cacheprovider"]).env("VMBED_GUEST", guests::virtio(home));
            run(pytest.current_dir(root().join("python/tests")));
        }),
        trial("every_function_of_the_header_is_bound", bound),
        trial("readme_programs", readme),
    ]
}

/// An environment with the package, and with what checks it. The library is the debug build, which is there already.
fn install(home: &Path) {
    run(Command::new("python3").args(["-m", "venv"]).arg(home));
    let pip = || {
        let mut pip = Command::new(home.join("bin/pip"));
        pip.args(["--quiet", "--disable-pip-version-check", "install"]);
        pip
    };
    run(pip().args(["mypy", "pytest", "scapy"]));
    let mut package = pip();
    package.arg(root().join("python")).env("VMBED_PROFILE", "debug");
    // Not the jobserver and flags of a make that runs these tests.
    run(package.env_remove("MAKEFLAGS").env_remove("MAKELEVEL"));
}

fn bound(home: &Path) {
    let header = std::fs::read_to_string(root().join("include/vmbed.h")).unwrap();
    let names: Vec<_> = header
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("vmbed_"))
        .collect();
    let program = "
import sys
from vmbed._lib import lib
for name in sys.stdin.read().split():
    getattr(lib, name)
print('bound')
";
    // Functions are followed by their parameters; types and members are not.
    let called: Vec<_> = names
        .iter()
        .filter(|name| {
            header
                .lines()
                .any(|line| !line.trim_start().starts_with('*') && line.contains(&format!("{name}(")))
        })
        .copied()
        .collect();
    assert!(called.len() > 90, "{called:?}");
    let package: String = std::fs::read_dir(root().join("python/vmbed"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "py") && !path.ends_with("_cdef.py"))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    for name in &called {
        // `make` frees what it has made. An error's status is what the call answered.
        let used = package.contains(&format!("lib.{name}"))
            || name.ends_with("_free")
            || *name == "vmbed_error_status";
        assert!(used, "the package has no use for {name}");
    }
    let list = home.join("names");
    std::fs::write(&list, called.join("\n")).unwrap();
    let mut python = Command::new(home.join("bin/python"));
    let said = run(python.args(["-c", program]).stdin(std::fs::File::open(&list).unwrap()));
    assert_eq!(said, "bound\n");
}

/// README's program that needs nothing but bare guests, word by word, and the package's own example.
fn readme(home: &Path) {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let program = readme.split("```python\n").nth(1).expect("README has a Python program");
    let program = program.split("```").next().unwrap();
    let said = run(Command::new(home.join("bin/python")).args(["-c", program]));
    assert_eq!(said, "b'x'\nGUEST_HALT\n");
    let page = std::fs::read_to_string(root().join("docs/networking.md")).unwrap();
    let programs = page.split("```python\n").skip(1).filter_map(|rest| rest.split("```").next());
    let names: Vec<_> = programs
        .enumerate()
        .map(|(i, program)| {
            let name = format!("page_{i}.py");
            std::fs::write(home.join(&name), program).unwrap();
            name
        })
        .collect();
    // Those that want rights and interfaces are functions that nobody calls: mypy reads them.
    run(Command::new(home.join("bin/mypy")).current_dir(home).arg("--strict").args(&names));
    let all = names.iter().map(|name| run(Command::new(home.join("bin/python")).current_dir(home).arg(name)));
    let said: String = all.collect();
    assert!(said == "{}\n" && names.len() > 14, "{names:?} of docs/networking.md said {said:?}");
    let doctest = "import doctest, vmbed; assert doctest.testmod(vmbed).failed == 0";
    run(Command::new(home.join("bin/python")).args(["-c", doctest]));
}

/// Runs a command that must succeed; what it printed.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?} cannot be started: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, erred) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{said}{erred}", output.status);
    said
}
