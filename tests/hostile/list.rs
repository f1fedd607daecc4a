//! The table of inputs that have broken VMMs, and which tests stand for each row.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A row: its number, the input or fault, what is made of it, and its tests, `FILE::NAME`. One that has none is pending.
struct Row(u32, &'static str, &'static str, Stands);

enum Stands {
    Tests(&'static [&'static str]),
    Pending(&'static str),
}
use Stands::{Pending, Tests};

/// The same guest through C.
const GUEST_IN_C: &str = "tests/c/hostile.c::guests_that_break_the_rules";

/// Of read-only memory (18, 30) a guest has none: all that it is given it may write to, and what is no memory takes every write (23).
const ROWS: [Row; 33] = [
    Row(
        1,
        "vsock packet length past the end of guest memory",
        "packet dropped, device goes on",
        Pending("there is no vsock device yet"),
    ),
    Row(
        2,
        "queue registers rewritten after DRIVER_OK",
        "writes ignored",
        Tests(&[
            "registers::row_02_queue_registers_written_after_driver_ok_stay",
            "driven::row_02_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        3,
        "queue_select out of range, then any queue register",
        "reads 0, writes ignored",
        Tests(&[
            "registers::row_03_a_queue_select_out_of_range_reads_zero_and_writes_nothing",
            "driven::row_03_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        4,
        "MSI-X table or PBA access out of bounds, odd sizes, across entries",
        "reads all-ones, writes ignored",
        Tests(&[
            "registers::row_04_mad_accesses_to_msix_read_all_ones_and_write_nothing",
            "driven::row_04_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        5,
        "queue size 0x10000, 0, not a power of two, above the maximum",
        "refused, queue not enabled",
        Tests(&[
            "registers::row_05_a_queue_size_that_cannot_be_is_refused",
            "driven::row_05_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        6,
        "notify with an index that has no queue",
        "ignored",
        Tests(&[
            "rows::row_06_a_doorbell_without_a_queue_is_ignored",
            "driven::row_06_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        7,
        "avail.idx further ahead than the queue's size",
        "NEEDS_RESET",
        Tests(&[
            "rows::row_07_an_available_index_too_far_ahead_breaks_the_queue",
            "driven::row_07_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        8,
        "looping chain, nested indirect, indirect with NEXT, indirect table of odd length",
        "NEEDS_RESET, worker free",
        Tests(&[
            "rows::row_08_malformed_chains_break_the_queue_and_not_the_worker",
            "driven::row_08_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        9,
        "chain of more than 2^32 bytes in all",
        "request error",
        Tests(&[
            "frames::row_09_a_chain_of_more_than_four_gib_is_an_error",
            "driven::row_09_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        10,
        "descriptor address + length wraps",
        "request error or NEEDS_RESET",
        Tests(&["rows::row_10_an_address_that_wraps_is_refused", "driven::row_10_by_a_guest", GUEST_IN_C]),
    ),
    Row(
        11,
        "the same head made available twice while in flight",
        "second refused, no use after free",
        Tests(&[
            "rows::row_11_a_head_that_is_in_flight_is_not_taken_again",
            "driven::row_11_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        12,
        "submitting for ever without waiting",
        "memory bounded by queue size",
        Tests(&[
            "frames::row_12_who_never_waits_keeps_no_more_than_the_queue_holds",
            "driven::row_12_by_a_guest",
            "driven::row_12_a_disk_that_does_not_answer_keeps_no_more_than_the_queue_holds",
            GUEST_IN_C,
        ]),
    ),
    Row(
        13,
        "chain that is only a head; empty chain",
        "completed with error, slot not leaked",
        Tests(&[
            "rows::row_13_chains_that_are_only_a_head_are_completed_and_leak_nothing",
            "driven::row_13_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        14,
        "sector x 512 overflows; each piece in bounds, the sum past the end",
        "IOERR",
        Tests(&[
            "rows::row_14_a_request_past_the_end_of_the_disk_is_an_error_as_a_whole",
            "driven::row_14_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        15,
        "descriptor direction flipped",
        "request error",
        Tests(&[
            "rows::row_15_buffers_of_the_wrong_direction_are_an_error",
            "driven::row_15_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        16,
        "balloon or reporting descriptor huge, unaligned, outside memory, twice",
        "ignored, counted",
        Tests(&[
            "rows::row_16_what_a_balloon_cannot_have_is_ignored_and_counted",
            "driven::row_16_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        17,
        "header split over descriptors (1 byte each), and header short",
        "works split; short: request error",
        Tests(&[
            "frames::row_17_a_header_in_pieces_works_and_a_short_one_is_an_error",
            "driven::row_17_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        18,
        "receive buffer outside plain memory (in a device's window, a hole, read-only)",
        "dropped",
        Tests(&[
            "frames::row_18_a_receive_buffer_outside_memory_gets_nothing",
            "driven::row_18_by_a_guest",
            "src/virtio/net/tests/landed.rs::what_landed_before_a_queue_failed_is_not_the_next_drivers",
            "src/virtio/net/tests/landed.rs::buffers_without_room_for_a_header_may_be_behind_others_but_not_first",
            GUEST_IN_C,
        ]),
    ),
    Row(
        19,
        "receive queue full under flood",
        "drops, recovers when buffers come",
        Tests(&[
            "frames::row_19_a_flood_without_buffers_drops_and_recovers",
            "driven::row_19_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        20,
        "frames of 0 to 13 bytes, above the maximum; bad virtio-net header offsets",
        "completed, dropped, goes on",
        Tests(&[
            "frames::row_20_frames_of_impossible_lengths_and_headers_are_dropped",
            "driven::row_20_by_a_guest",
            "driven::row_20_frames_from_outside_of_impossible_lengths",
            "driven::row_20_offsets_behind_the_frame_with_offloads",
            GUEST_IN_C,
        ]),
    ),
    Row(
        21,
        "vsock: loop spin, unbounded per-port state",
        "bounded, RST",
        Pending("there is no vsock device yet"),
    ),
    Row(
        22,
        "fast input into the serial port while the guest does not read",
        "bounded, back-pressure",
        Tests(&[
            "rows::row_22_input_that_the_guest_does_not_read_waits_outside",
            "driven::row_22_by_a_guest",
            "driven::row_22_a_serial_port_that_the_guest_does_not_read",
            GUEST_IN_C,
        ]),
    ),
    Row(
        23,
        "port I/O or MMIO of any size to any address, also unregistered",
        "reads all-ones, writes ignored",
        Tests(&[
            "registers::row_23_every_port_and_every_width_everywhere",
            "driven::row_23_by_a_guest",
            GUEST_IN_C,
        ]),
    ),
    Row(
        24,
        "qcow2 whose backing or data file names a host path; qcow2 header written by the guest into a raw disk",
        "refused unless the embedder allowed that file; raw stays raw",
        Tests(&[
            "files::row_24_an_image_that_names_files_of_the_host",
            "files::row_24_a_header_that_a_guest_writes_into_a_raw_disk",
            "src/block/tests/qcow2.rs::no_file_is_opened_that_the_embedder_has_not_named",
            "tests/c/lies.c::files_that_lie_and_fail",
        ]),
    ),
    Row(
        25,
        "ELF, bzImage, initrd, ACPI-relevant config malformed or larger than memory",
        "build error that names the file and the field",
        Tests(&[
            "files::row_25_kernels_and_initrds_that_lie",
            "files::row_25_bzimages_that_lie",
            "files::row_25_initrds_that_cannot_be",
            "files::row_25_a_machine_that_no_table_describes",
            "src/boot/tests.rs::every_lie_in_an_elf_header_is_named",
            "src/boot/tests.rs::every_lie_in_a_bzimage_header_is_named",
            "src/boot/tests.rs::bent_images_are_loaded_or_refused_but_never_more",
            "tests/c/lies.c::files_that_lie_and_fail",
        ]),
    ),
    Row(
        26,
        "corrupt, truncated, newer or foreign snapshot; array lengths that disagree",
        "error, no VM",
        Pending("there are no snapshots yet"),
    ),
    Row(
        27,
        "configuration sizes that wrap (MiB to bytes), 0 vCPUs, more than KVM's limit, overlapping devices",
        "validate() names them all",
        Tests(&[
            "files::row_27_configurations_that_cannot_be",
            "tests/api/life.rs::every_bad_field_at_once",
            "tests/c/api.c::every_bad_field_at_once",
            "tests/c/lies.c::files_that_lie_and_fail",
        ]),
    ),
    Row(
        28,
        "the disk file shrinks, the disk is full, EIO, the file system goes read-only, mid-flight",
        "IOERR to the guest, event, no lost acknowledged write",
        Tests(&[
            "files::row_28_a_file_that_shrinks_and_grows",
            "files::row_28_a_file_that_shrinks_below_a_driver",
            "files::row_28_a_disk_that_is_full",
            "files::row_28_a_host_that_fails_and_a_file_system_that_is_only_read",
            "tests/linux/failing.rs::a_device_that_fails_and_a_file_system_that_is_read_only",
            "src/block/raw.rs::a_read_beyond_the_end_of_a_shrunk_file_fails",
            "tests/c/lies.c::files_that_lie_and_fail",
            "tests/c/failing.c::disks_whose_host_fails",
        ]),
    ),
    Row(
        29,
        "the tap goes away or is brought down; the bridge is deleted",
        "frames dropped, event (none for the bridge, which is not the card's), works again when it returns",
        Tests(&["host::row_29_a_tap_and_a_bridge_that_go_away", "tests/c/host.c::networks_that_go_away"]),
    ),
    Row(
        30,
        "guest writes to read-only memory, jumps to a hole, triple-faults, spins with interrupts off, halts for ever",
        "cause reported; `stop` ends it in bounded time",
        Tests(&[
            "ends::row_30_a_jump_to_where_nothing_is",
            "ends::row_30_a_triple_fault",
            "ends::row_30_spinning_with_interrupts_off",
            "ends::row_30_halting_for_ever",
            "tests/c/lies.c::vcpus_that_cannot_go_on",
        ]),
    ),
    Row(
        31,
        "out of memory in the host: mmap fails, memfd hits its limit, SIGBUS on a page that cannot be had",
        "build error, or that VM stops with a cause",
        Tests(&[
            "host::row_31_addresses_that_the_host_has_not",
            "host::row_31_a_memfd_that_may_not_be_so_large",
            "tests/api/memory.rs::memory_that_is_lost",
            "tests/c/memory.c::memory_that_is_lost",
            "tests/c/host.c::too_few_descriptors_and_a_storm",
        ]),
    ),
    Row(
        32,
        "a signal storm, EINTR everywhere, a fork in the embedding process, RLIMIT_NOFILE reached mid-build",
        "error, everything taken back",
        Tests(&[
            "host::row_32_too_few_descriptors_for_a_build",
            "host::row_32_a_storm_of_signals",
            "tests/cycles.rs::signals_at_every_library_thread_change_nothing",
            "tests/api/races.rs::a_fork_while_a_vm_runs",
            "tests/c/races.c::a_fork_while_a_vm_runs",
            "tests/c/host.c::too_few_descriptors_and_a_storm",
        ]),
    ),
    Row(
        33,
        "an embedder's callback that panics, blocks, re-enters the API, or frees its own VM",
        "contained or a clear error; documented",
        Tests(&[
            "ends::row_33_a_callback_that_fails_or_panics",
            "ends::row_33_a_callback_that_blocks",
            "ends::row_33_a_callback_that_reenters",
            "ends::row_33_a_callback_that_frees_its_vm",
            "tests/api/callbacks.rs::a_callback_that_panics",
            "tests/c/callbacks.c::a_callback_that_blocks",
            "tests/c/callbacks.c::a_callback_reenters",
            "tests/c/callbacks.c::other_callbacks_reenter_and_free",
            "tests/c/api.c::a_device_that_fails_is_the_cause",
            "tests/c/api.c::a_callback_stops_its_vm",
            "tests/c/api.c::a_callback_frees_its_vm",
        ]),
    ),
];

/// The text of a file of the tree; `rows` stands for `tests/hostile/rows.rs`.
fn source(file: &str) -> String {
    let path = if file.contains('/') { file.to_owned() } else { format!("tests/hostile/{file}.rs") };
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&path))
        .unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Whether the file has a test, or a case of the API's, of that name.
fn exists(file: &str, name: &str) -> bool {
    let text = source(file);
    let listed = || include_str!("../api-cases").lines().any(|line| line.split(' ').next() == Some(name));
    if file.ends_with(".c") {
        listed()
            && ["void", "static void"].iter().any(|kind| text.contains(&format!("\n{kind} {name}(void)\n")))
    } else if file.starts_with("tests/api/") {
        listed() && text.contains(&format!("\npub fn {name}()"))
    } else {
        // The guest's rows have theirs from a macro, and trials are named where they are listed.
        text.contains(&format!("    {name} = "))
            || text.contains(&format!("trial(\"{name}\", "))
            || text.contains(&format!("::{name}\","))
            || text
                .split("#[test]")
                .skip(1)
                .any(|rest| rest.trim_start().starts_with(&format!("fn {name}()")))
    }
}

#[test]
fn every_row_is_there_and_has_tests_or_a_reason() {
    for (Row(number, what, answer, stands), want) in ROWS.iter().zip(1..) {
        assert_eq!(*number, want);
        assert!(!what.is_empty() && !answer.is_empty());
        match stands {
            Pending(why) => assert!(why.starts_with("there "), "row {number}: {why}"),
            Tests(tests) => {
                assert!(!tests.is_empty(), "row {number}");
                for test in *tests {
                    let (file, name) = test.rsplit_once("::").unwrap();
                    assert!(exists(file, name), "row {number}: there is no test {test}");
                }
            }
        }
    }
    assert!(!exists("rows", "row_06_a_doorbell") && !exists("tests/c/hostile.c", "row_06"), "it can tell");
}

/// And the other way round: a test with a row's number in its name stands in that row.
#[test]
fn every_test_of_a_row_is_listed() {
    let mut listed = BTreeSet::new();
    for Row(number, .., stands) in &ROWS {
        if let Tests(tests) = stands {
            listed.extend(tests.iter().map(|test| (*number, test.rsplit("::").next().unwrap().to_owned())));
        }
    }
    let found: BTreeSet<_> = ["rows", "registers", "frames", "files", "ends", "host", "driven"]
        .into_iter()
        .flat_map(|file| {
            let text = source(file);
            let words =
                text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| w.starts_with("row_"));
            words.map(str::to_owned).collect::<Vec<_>>()
        })
        .filter_map(|name| Some((name.get(4..6)?.parse().ok()?, name)))
        .collect();
    let unlisted: Vec<_> = found.difference(&listed).collect();
    assert!(unlisted.is_empty(), "{unlisted:?}");
}

/// Each row that has tests has a mutant that takes its defence out.
#[test]
fn every_row_has_a_mutant() {
    for Row(number, .., stands) in &ROWS {
        let patch =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/hostile/mutants/{number:02}.patch"));
        assert_eq!(patch.exists(), matches!(stands, Tests(_)), "{}", patch.display());
    }
}

/// The mutants: row, file and text.
fn mutants() -> Vec<(u32, PathBuf, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile/mutants");
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let patches = paths.filter(|path| path.extension().is_some_and(|end| end == "patch"));
    patches
        .map(|path| {
            let row = path.file_name().unwrap().to_str().unwrap()[..2].parse().unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            (row, path, text)
        })
        .collect()
}

/// Which of the listed tests a patch's line `Test: PROGRAM FILTER` runs.
fn runs(program: &str, filter: &str, test: &str) -> bool {
    let (file, name) = test.rsplit_once("::").unwrap();
    let is_there = match program {
        "hostile" => !file.contains('/'),
        "lib" => file.starts_with("src/"),
        // Of the API's cases some are C's.
        other => !file.ends_with(".c") && file.strip_prefix("tests/").is_some_and(|at| at.starts_with(other)),
    };
    is_there && name.contains(filter)
}

/// A mutant's test is one of its row's: what notices that the defence is gone is in the table.
#[test]
fn every_mutant_names_a_test_of_its_row() {
    for (row, path, text) in mutants() {
        let path = path.display();
        assert!(text.starts_with(&format!("Row {row:02}: ")), "{path}");
        let line = text.lines().nth(1).and_then(|line| line.strip_prefix("Test: "));
        let (program, filter) = line.and_then(|line| line.split_once(' ')).unwrap();
        let Tests(tests) = &ROWS[row as usize - 1].3 else { panic!("{path}: row {row} is pending") };
        assert!(tests.iter().any(|test| runs(program, filter, test)), "{path}: {program} {filter}");
    }
    assert!(!runs("lib", "row_06", "rows::row_06_by") && !runs("api", "a_fork", "tests/c/races.c::a_fork"));
}

/// `make mutants` takes an hour; that its patches fit what they take something out of is known at once.
#[test]
fn every_mutant_applies() {
    for (_, path, _) in mutants() {
        let mut patch = std::process::Command::new("patch");
        patch.args(["-p1", "--dry-run", "--fuzz=0", "--force"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        let patch = patch.stdin(std::fs::File::open(&path).unwrap()).output();
        let patch = patch.expect("patch must be installed (tests/setup)");
        let said = String::from_utf8_lossy(&patch.stdout).into_owned();
        assert!(patch.status.success(), "{}: {said}", path.display());
    }
}
