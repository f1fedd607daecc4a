//! A C program made from the header: every function called wrongly in every way.

use std::fmt::Write;

struct Function {
    result: String,
    name: String,
    parameters: Vec<Parameter>,
}

struct Parameter {
    kind: String,
    name: String,
}

impl Parameter {
    fn is_pointer(&self) -> bool {
        self.kind.ends_with('*') || self.kind.ends_with("_fn")
    }

    /// The structure that begins with its size, where it points to one.
    fn structure(&self) -> Option<&'static str> {
        STRUCTURES.into_iter().find(|s| self.kind.trim_start_matches("const ") == format!("{s} *"))
    }
}

const STRUCTURES: [&str; 25] = [
    "vmbed_verdict",
    "vmbed_memory",
    "vmbed_vcpu_statistics",
    "vmbed_host_options",
    "vmbed_usage",
    "vmbed_disk",
    "vmbed_net",
    "vmbed_registers",
    "vmbed_device_ops",
    "vmbed_block_ops",
    "vmbed_net_ops",
    "vmbed_disk_statistics",
    "vmbed_net_statistics",
    "vmbed_backing",
    "vmbed_balloon",
    "vmbed_balloon_statistics",
    "vmbed_guest_memory",
    "vmbed_switch_options",
    "vmbed_port_options",
    "vmbed_port_statistics",
    "vmbed_reclaim_options",
    "vmbed_pressure",
    "vmbed_bridge_options",
    "vmbed_tap_options",
    "vmbed_sandbox",
];

/// Where the header says that NULL is good, for every function that has the parameter.
const NULL_IS_GOOD: [&str; 21] = [
    "error", "user", "destroy", "options", "kvm", "initrd", "uuid", "cause", "taken", "monitor", "ports",
    "written", "missed", "parent", "rate", "backing", "progress", "complete", "receive", "send", "trunk",
];

/// What the numbers of an enumeration are called.
const ENUMERATIONS: [&str; 5] = ["mode", "register_", "platform", "console", "level"];

/// Structures that have grown since the baseline, and their first new field.
const GROWN: [(&str, &str); 10] = [
    ("vmbed_block_ops", "discard"),
    ("vmbed_disk", "format"),
    ("vmbed_disk_statistics", "discards"),
    ("vmbed_host_options", "memory_min_unit"),
    ("vmbed_usage", "dedicated_vcpus"),
    ("vmbed_memory", "loaned"),
    ("vmbed_net", "mtu"),
    ("vmbed_net_ops", "offloads"),
    ("vmbed_net_statistics", "rx_filtered"),
    ("vmbed_reclaim_options", "sandbox"),
];

/// What the program needs before `main`.
const PROLOGUE: &str = r#"#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vmbed.h>

static vmbed_error *err, *some_error;
static vmbed_host *some_host, *out_host;
static vmbed_probe *some_probe, *out_probe;
static vmbed_config *some_config, *some_linux, *out_config;
static vmbed_builder *some_builder, *out_builder;
static vmbed_vm *some_vm, *out_vm;
static vmbed_events *some_events, *out_events;
static vmbed_event *some_event, *out_event;
static vmbed_dispatcher *some_dispatcher, *out_dispatcher;
static vmbed_block *some_block;
static vmbed_rate a_rate, *some_rate = &a_rate;
static vmbed_backing_file a_file = {.path = "/d"}, *some_backing_file = &a_file;
static vmbed_switch *some_switch, *out_switch;
static vmbed_port *some_port, *out_port;
static vmbed_capture *some_capture, *out_capture;
static vmbed_wiring *some_wiring, *out_wiring;
static uint8_t bytes[4096];
static uint32_t numbers[4];
static size_t count;
static uint64_t wide;
static bool truth;
static int32_t number, calls, nowhere;

static int32_t f_read(void *u, uint32_t v, uint64_t o, uint8_t *d, size_t l) { (void)u, (void)v, (void)o, (void)d, (void)l; return 0; }
static int32_t f_write(void *u, uint32_t v, uint64_t o, const uint8_t *d, size_t l) { (void)u, (void)v, (void)o, (void)d, (void)l; return 0; }
static int32_t f_block(void *u, const vmbed_block_request *r) { (void)u, (void)r; return 0; }
static int32_t f_receive(void *u, const vmbed_piece *p, size_t c, size_t *l) { (void)u, (void)p, (void)c, (void)l; return 0; }
static int32_t f_send(void *u, const vmbed_piece *p, size_t c) { (void)u, (void)p, (void)c; return 0; }
static void f_log(void *u, int32_t l, const char *t, const char *m) { (void)u, (void)l, (void)t, (void)m; }
static void f_console(void *u, const uint8_t *d, size_t l) { (void)u, (void)d, (void)l; }
static void f_thread(void *u, uint64_t i, int32_t r, uint32_t n, int32_t t) { (void)u, (void)i, (void)r, (void)n, (void)t; }
static bool f_progress(void *u, uint64_t b, uint64_t a) { (void)u, (void)b, (void)a; return true; }
static void f_destroy(void *u) { (void)u; }

/* One byte longer than needed lies behind each, so that a larger size has a tail to look at. */
#define STRUCTURE(type) static union { type s; uint8_t room[sizeof(type) + 64]; } the_##type
STRUCTURE(vmbed_host_options);
STRUCTURE(vmbed_usage);
STRUCTURE(vmbed_verdict);
STRUCTURE(vmbed_memory);
STRUCTURE(vmbed_vcpu_statistics);
STRUCTURE(vmbed_disk);
STRUCTURE(vmbed_net);
STRUCTURE(vmbed_registers);
STRUCTURE(vmbed_device_ops);
STRUCTURE(vmbed_block_ops);
STRUCTURE(vmbed_net_ops);
STRUCTURE(vmbed_disk_statistics);
STRUCTURE(vmbed_net_statistics);
STRUCTURE(vmbed_backing);
STRUCTURE(vmbed_balloon);
STRUCTURE(vmbed_balloon_statistics);
STRUCTURE(vmbed_guest_memory);
STRUCTURE(vmbed_switch_options);
STRUCTURE(vmbed_port_options);
STRUCTURE(vmbed_port_statistics);
STRUCTURE(vmbed_reclaim_options);
STRUCTURE(vmbed_pressure);
STRUCTURE(vmbed_bridge_options);
STRUCTURE(vmbed_tap_options);
STRUCTURE(vmbed_sandbox);

static void good(void)
{
    static const uint8_t code[] = {0xf4};
    memset(&the_vmbed_host_options, 0, sizeof the_vmbed_host_options), the_vmbed_host_options.s.size = sizeof(vmbed_host_options);
    memset(&the_vmbed_usage, 0, sizeof the_vmbed_usage), the_vmbed_usage.s.size = sizeof(vmbed_usage);
    memset(&the_vmbed_verdict, 0, sizeof the_vmbed_verdict), the_vmbed_verdict.s.size = sizeof(vmbed_verdict);
    memset(&the_vmbed_memory, 0, sizeof the_vmbed_memory), the_vmbed_memory.s.size = sizeof(vmbed_memory);
    memset(&the_vmbed_vcpu_statistics, 0, sizeof the_vmbed_vcpu_statistics), the_vmbed_vcpu_statistics.s.size = sizeof(vmbed_vcpu_statistics);
    memset(&the_vmbed_disk, 0, sizeof the_vmbed_disk), the_vmbed_disk.s = (vmbed_disk){.size = sizeof(vmbed_disk), .path = "/d"};
    memset(&the_vmbed_net, 0, sizeof the_vmbed_net), the_vmbed_net.s = (vmbed_net){.size = sizeof(vmbed_net), .tap = "t"};
    memset(&the_vmbed_registers, 0, sizeof the_vmbed_registers), the_vmbed_registers.s.size = sizeof(vmbed_registers);
    memset(&the_vmbed_device_ops, 0, sizeof the_vmbed_device_ops);
    the_vmbed_device_ops.s = (vmbed_device_ops){sizeof(vmbed_device_ops), f_read, f_write, NULL};
    memset(&the_vmbed_block_ops, 0, sizeof the_vmbed_block_ops);
    the_vmbed_block_ops.s = (vmbed_block_ops){sizeof(vmbed_block_ops), f_block, f_block, f_block, NULL, f_block, f_block};
    memset(&the_vmbed_net_ops, 0, sizeof the_vmbed_net_ops);
    the_vmbed_net_ops.s = (vmbed_net_ops){sizeof(vmbed_net_ops), f_receive, f_send, NULL, VMBED_OFFLOAD_CSUM, 0, NULL};
    memset(&the_vmbed_disk_statistics, 0, sizeof the_vmbed_disk_statistics), the_vmbed_disk_statistics.s.size = sizeof(vmbed_disk_statistics);
    memset(&the_vmbed_net_statistics, 0, sizeof the_vmbed_net_statistics), the_vmbed_net_statistics.s.size = sizeof(vmbed_net_statistics);
    memset(&the_vmbed_backing, 0, sizeof the_vmbed_backing), the_vmbed_backing.s.size = sizeof(vmbed_backing);
    memset(&the_vmbed_balloon, 0, sizeof the_vmbed_balloon), the_vmbed_balloon.s.size = sizeof(vmbed_balloon);
    memset(&the_vmbed_balloon_statistics, 0, sizeof the_vmbed_balloon_statistics), the_vmbed_balloon_statistics.s.size = sizeof(vmbed_balloon_statistics);
    memset(&the_vmbed_guest_memory, 0, sizeof the_vmbed_guest_memory), the_vmbed_guest_memory.s.size = sizeof(vmbed_guest_memory);
    memset(&the_vmbed_switch_options, 0, sizeof the_vmbed_switch_options), the_vmbed_switch_options.s.size = sizeof(vmbed_switch_options);
    memset(&the_vmbed_port_options, 0, sizeof the_vmbed_port_options), the_vmbed_port_options.s.size = sizeof(vmbed_port_options);
    memset(&the_vmbed_port_statistics, 0, sizeof the_vmbed_port_statistics), the_vmbed_port_statistics.s.size = sizeof(vmbed_port_statistics);
    memset(&the_vmbed_reclaim_options, 0, sizeof the_vmbed_reclaim_options), the_vmbed_reclaim_options.s.size = sizeof(vmbed_reclaim_options);
    memset(&the_vmbed_pressure, 0, sizeof the_vmbed_pressure), the_vmbed_pressure.s.size = sizeof(vmbed_pressure);
    memset(&the_vmbed_bridge_options, 0, sizeof the_vmbed_bridge_options), the_vmbed_bridge_options.s.size = sizeof(vmbed_bridge_options);
    memset(&the_vmbed_tap_options, 0, sizeof the_vmbed_tap_options), the_vmbed_tap_options.s.size = sizeof(vmbed_tap_options);
    memset(&the_vmbed_sandbox, 0, sizeof the_vmbed_sandbox), the_vmbed_sandbox.s.size = sizeof(vmbed_sandbox);
    vmbed_capture_free(some_capture), vmbed_port_free(some_port), vmbed_switch_free(some_switch), vmbed_wiring_free(some_wiring);
    if (vmbed_switch_new(NULL, &some_switch, NULL) || vmbed_switch_add_port(some_switch, "p", NULL, &some_port, NULL) ||
        vmbed_switch_capture(some_switch, NULL, 0, nowhere, &some_capture, NULL) || vmbed_wiring_new(&some_wiring, NULL))
        abort();
    vmbed_builder_free(some_builder), vmbed_config_free(some_config), vmbed_vm_free(some_vm);
    vmbed_builder *builder;
    if (vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, code, 1, &some_config, NULL) ||
        vmbed_builder_new(some_host, some_config, &builder, NULL) || vmbed_builder_build(builder, &some_vm, NULL) ||
        vmbed_builder_new(some_host, some_config, &some_builder, NULL))
        abort();
    vmbed_builder_free(builder);
}

static void must_fail(int32_t status, const char *call)
{
    calls++;
    if (status >= 0 || status < VMBED_ERR_INTERNAL || status == VMBED_ERR_INTERNAL) {
        fprintf(stderr, "%s: %d\n", call, status);
        abort();
    }
    vmbed_error_free(err);
    err = NULL;
}

static void must_live(void)
{
    calls++;
    vmbed_error_free(err), err = NULL;
    vmbed_host_free(out_host), vmbed_probe_free(out_probe), vmbed_config_free(out_config), vmbed_builder_free(out_builder);
    vmbed_vm_free(out_vm), vmbed_events_free(out_events), vmbed_event_free(out_event);
    vmbed_dispatcher_free(out_dispatcher), out_dispatcher = NULL;
    vmbed_capture_free(out_capture), vmbed_port_free(out_port), vmbed_switch_free(out_switch), vmbed_wiring_free(out_wiring);
    out_wiring = NULL, out_capture = NULL, out_port = NULL, out_switch = NULL;
    out_host = NULL, out_probe = NULL, out_config = NULL, out_builder = NULL, out_vm = NULL, out_events = NULL, out_event = NULL;
}

int main(void)
{
    /* Some calls make interfaces. Who may not have a namespace may not make them either. */
    (void)unshare(CLONE_NEWNET);
    nowhere = open("/dev/null", O_RDWR);
    if (vmbed_host_open(NULL, &some_host, NULL) || vmbed_config_new_linux("/k", &some_linux, NULL) || vmbed_events_new(&some_events, NULL) ||
        vmbed_probe_new(NULL, &some_probe, NULL) || vmbed_dispatcher_new(&some_dispatcher, NULL))
        abort();
    vmbed_config_validate(NULL, &some_error);
    (void)number, (void)numbers, (void)wide, (void)count, (void)f_log, (void)f_console, (void)f_thread, (void)f_progress, (void)truth, (void)f_destroy, (void)some_event, (void)some_block;
"#;

/// The program, and how many calls it will count.
pub fn wrong_arguments(header: &str) -> (String, usize) {
    let (mut program, mut calls) = (PROLOGUE.to_owned(), 0);
    for function in functions(header) {
        let mut good: Vec<_> = function.parameters.iter().map(value).collect();
        if ["initrd", "cmdline", "kaslr"].iter().any(|what| function.name.ends_with(what)) {
            good[0] = "some_linux".to_owned();
        }
        for (i, parameter) in function.parameters.iter().enumerate() {
            let mut wrong = Vec::new();
            if parameter.is_pointer() {
                wrong.push((
                    "NULL".to_owned(),
                    !NULL_IS_GOOD.contains(&parameter.name.as_str()),
                    String::new(),
                ));
            }
            if ENUMERATIONS.contains(&parameter.name.as_str()) {
                wrong.extend(
                    ["-1", "99", "INT32_MAX", "INT32_MIN"].map(|n| (n.to_owned(), true, String::new())),
                );
            }
            if let Some(name) = parameter.structure() {
                let size = |size: &str| format!("the_{name}.s.size = {size};");
                let first = GROWN.iter().find(|(grown, _)| *grown == name);
                let first = first
                    .map_or(format!("sizeof({name})"), |(_, field)| format!("offsetof({name}, {field})"));
                for short in ["0", "1", &format!("{first} - 1"), "SIZE_MAX"] {
                    wrong.push((good[i].clone(), true, size(short)));
                }
                if parameter.kind.starts_with("const") {
                    let tail = format!("the_{name}.room[sizeof({name}) + 15] = 1;");
                    wrong.push((good[i].clone(), true, size(&format!("sizeof({name}) + 16")) + &tail));
                }
            }
            for (value, fails, before) in wrong {
                let mut arguments = good.clone();
                arguments[i] = value;
                let call = format!("{}({})", function.name, arguments.join(", "));
                // What a free function is given is gone, and log lines belong to nobody here.
                let fails = fails && function.result == "int32_t" && function.name != "vmbed_log_set"
                    || function.name == "vmbed_log_set" && parameter.name == "level";
                writeln!(program, "    good(); {before}").unwrap();
                if fails && function.result == "int32_t" && !is_getter(&function) {
                    writeln!(program, "    must_fail({call}, \"{}: {}\");", function.name, parameter.name)
                        .unwrap();
                } else {
                    writeln!(program, "    (void){call}; must_live();").unwrap();
                }
                calls += 1;
            }
        }
    }
    program += "    printf(\"%d calls\\n\", calls);\n    return 0;\n}\n";
    (program, calls)
}

/// A library with the header's functions, which do nothing.
pub fn stand_in(header: &str) -> String {
    let mut library = "#include <vmbed.h>\n".to_owned();
    for function in functions(header) {
        let parameters: Vec<_> =
            function.parameters.iter().map(|p| format!("{} {}", p.kind, p.name)).collect();
        let parameters = if parameters.is_empty() { "void".to_owned() } else { parameters.join(", ") };
        writeln!(library, "{} {}({parameters}) {{ __builtin_trap(); }}", function.result, function.name)
            .unwrap();
    }
    library
}

/// A function that answers a value, not a status: it has no `error`.
fn is_getter(function: &Function) -> bool {
    function.parameters.iter().all(|p| p.name != "error")
}

/// A good value for a parameter.
fn value(parameter: &Parameter) -> String {
    let (kind, name) = (parameter.kind.as_str(), parameter.name.as_str());
    let object = kind.trim_start_matches("const ").trim_start_matches("vmbed_").trim_end_matches(['*', ' ']);
    match kind {
        _ if parameter.structure().is_some() => format!("&the_vmbed_{object}.s"),
        "vmbed_error **" => "&err".to_owned(),
        _ if kind.ends_with("**") => format!("&out_{object}"),
        _ if kind.ends_with("_fn") => format!("f_{}", object.trim_end_matches("_fn")),
        _ if name == "ports" => "NULL".to_owned(),
        // A free function gets nothing to free: its NULL is what is called.
        _ if kind.contains("vmbed_") => format!("some_{object}"),
        "const char *" => "\"x\"".to_owned(),
        "const uint8_t *" | "uint8_t *" => "bytes".to_owned(),
        "const uint32_t *" => "numbers".to_owned(),
        "size_t *" => "&count".to_owned(),
        "int32_t *" => "&number".to_owned(),
        "uint64_t *" => "&wide".to_owned(),
        "bool *" => "&truth".to_owned(),
        "void *" => "NULL".to_owned(),
        "int32_t" if name == "fd" => "nowhere".to_owned(),
        "size_t" if name == "length" || name == "room" => "1".to_owned(),
        _ if name == "length" => "1".to_owned(),
        _ => "0".to_owned(),
    }
}

/// The functions that the header declares.
fn functions(header: &str) -> Vec<Function> {
    let mut code = String::new();
    let mut rest = header;
    while let Some((before, after)) = rest.split_once("/*") {
        code += before;
        rest = after.split_once("*/").map_or("", |(_, after)| after);
    }
    code += rest;
    let code: String = code.lines().filter(|l| !l.starts_with('#')).flat_map(|l| [l, " "]).collect();
    let statements = code.split([';', '}', '{']).map(str::trim);
    statements
        .filter(|s| s.ends_with(')') && !s.starts_with("typedef") && s.contains("vmbed_"))
        .filter_map(|statement| {
            let (head, parameters) = statement.split_once('(')?;
            let (result, name) = split_name(head);
            // Members of structures are functions with a pointer for a name.
            if !name.starts_with("vmbed_") {
                return None;
            }
            let parameters = parameters.trim_end_matches(')').split(',').map(str::trim);
            let parameters = parameters.filter(|p| *p != "void").map(|p| {
                let (kind, name) = split_name(p);
                Parameter { kind, name }
            });
            Some(Function { result, name, parameters: parameters.collect() })
        })
        .collect()
}

/// `const char *name` as its type and its name.
fn split_name(text: &str) -> (String, String) {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let at = text.rfind(|c: char| !c.is_alphanumeric() && c != '_').map_or(0, |i| i + 1);
    (text[..at].trim().to_owned(), text[at..].to_owned())
}
