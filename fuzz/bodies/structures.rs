#![allow(unsafe_code, reason = "a program in C has nothing else")]
//! C's structures with sizes, as programs of other versions pass them to the real functions: every size, tails that are not
//! known, NULL, numbers out of range. What crosses is what the same would be in Rust.

use std::ffi::{c_char, c_void};
use std::ptr::null_mut;

use arbitrary::{Result, Unstructured};
use vmbed::internals::crossed::{self, FORMS, Form};
use vmbed::{
    BackingConfig, BackingKind, BalloonConfig, CacheMode, DiskConfig, DiskEngine, DiskFormat, HugePages,
    IpPrefix, NetConfig, PortOptions, PortVlan, RateLimit, Switch, SwitchOptions, Vhost,
};

use super::given::{
    Given, INVALID, Kind, Text, UNSUPPORTED, count, file, mac, maybe, number, numbers, pci, rate, utf8, words,
};

const STEPS: usize = 64;
const OK: i32 = 0;

type Handle = *mut c_void;
type Add = unsafe extern "C" fn(Handle, *const c_void, *mut Handle) -> i32;

unsafe extern "C" {
    fn vmbed_config_new_linux(kernel: *const c_char, config: *mut Handle, error: *mut Handle) -> i32;
    fn vmbed_config_free(config: Handle);
    fn vmbed_config_add_disk(config: Handle, disk: *const c_void, error: *mut Handle) -> i32;
    fn vmbed_config_add_net(config: Handle, net: *const c_void, error: *mut Handle) -> i32;
    fn vmbed_config_set_balloon(config: Handle, balloon: *const c_void, error: *mut Handle) -> i32;
    fn vmbed_config_set_backing(config: Handle, backing: *const c_void, error: *mut Handle) -> i32;
    fn vmbed_switch_new(options: *const c_void, switch: *mut Handle, error: *mut Handle) -> i32;
    fn vmbed_switch_free(switch: Handle);
    fn vmbed_switch_add_port(
        switch: Handle,
        name: *const c_char,
        options: *const c_void,
        port: *mut Handle,
        error: *mut Handle,
    ) -> i32;
    fn vmbed_port_get_statistics(port: Handle, statistics: *mut c_void, error: *mut Handle) -> i32;
    fn vmbed_port_free(port: Handle);
    fn vmbed_error_status(error: Handle) -> i32;
    fn vmbed_error_message(error: Handle) -> *const c_char;
    fn vmbed_error_free(error: Handle);
}

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Structures that crossed, by their kind.
    pub disks: u32,
    pub nets: u32,
    pub balloons: u32,
    pub backings: u32,
    pub switches: u32,
    pub ports: u32,
    pub hosts: u32,
    pub statistics: u32,
    /// Those that only something which runs is given or fills, as [`FORMS`].
    pub forms: [u32; FORMS.len()],
    /// Those of older programs, and of newer ones that set nothing new.
    pub older: u32,
    pub newer: u32,
    /// What was refused: sizes, fields that are not known, NULL, what was freed, and values.
    pub sizes: u32,
    pub unknown: u32,
    pub null: u32,
    pub freed: u32,
    pub values: u32,
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let all = [
            ("disks", self.disks),
            ("nets", self.nets),
            ("balloons", self.balloons),
            ("backings", self.backings),
            ("switches", self.switches),
            ("ports", self.ports),
            ("hosts", self.hosts),
            ("statistics", self.statistics),
            ("older", self.older),
            ("newer", self.newer),
            ("sizes", self.sizes),
            ("unknown", self.unknown),
            ("null", self.null),
            ("freed", self.freed),
            ("values", self.values),
        ];
        let mut all = all.map(|(name, count)| (name, count.into())).to_vec();
        all.extend(FORMS.iter().zip(self.forms).map(|(form, count)| (form.name, count.into())));
        all
    }
}

const DISK: Kind = Kind { first: 40, full: 136, pointers: &[8, 16, 24, 96, 104, 112, 120, 128] };
const NET: Kind = Kind { first: 32, full: 128, pointers: &[8, 16, 24, 112] };
const BALLOON: Kind = Kind { first: 32, full: 32, pointers: &[8] };
const BACKING: Kind = Kind { first: 40, full: 40, pointers: &[24, 32] };
const SWITCH: Kind = Kind { first: 16, full: 16, pointers: &[] };
const PORT: Kind = Kind { first: 152, full: 152, pointers: &[16, 40, 48] };
const HOST: Kind = Kind { first: 48, full: 104, pointers: &[8, 88, 96] };
const STATISTICS: Kind = Kind { first: 288, full: 288, pointers: &[] };

/// How long the first version of each of [`FORMS`] was that has grown since: the others were as they are.
const GROWN: [(&str, usize); 6] = [
    ("vmbed_block_ops", 40),
    ("vmbed_disk_statistics", 56),
    ("vmbed_memory", 96),
    ("vmbed_net_ops", 32),
    ("vmbed_net_statistics", 56),
    ("vmbed_usage", 40),
];

/// Good ones, and some that are not.
const PLACES: [&str; 4] = ["00:03.0", "0000:00:1f.7", "00:00.0", "01:02.0"];
const MACS: [&str; 3] = ["52:54:00:12:34:56", "02:00:00:00:00:01", "ff:ff:ff:ff:ff:ff"];
const PATHS: [&str; 3] = ["/images/disk.img", "x", ""];

struct Caller {
    config: Handle,
    freed: Handle,
    switch: Handle,
    port: Handle,
    ports: u32,
    depth: Depth,
}

/// Runs one input. Panics where what crosses is not what was given.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let mut caller = Caller::new();
    for _ in 0..STEPS {
        if u.is_empty() || caller.step(&mut u).is_err() {
            break;
        }
    }
    caller.depth
}

impl Drop for Caller {
    fn drop(&mut self) {
        // SAFETY: handles that were made below; a second free is a no-op.
        unsafe {
            vmbed_config_free(self.config);
            vmbed_port_free(self.port);
            vmbed_switch_free(self.switch);
        }
    }
}

impl Caller {
    fn new() -> Self {
        let [mut config, mut freed, mut switch, mut port] = [null_mut(); 4];
        // SAFETY: strings, and places for results; NULL for errors that nobody wants.
        unsafe {
            for (kernel, made) in [(c"freed", &mut freed), (c"kernel", &mut config)] {
                assert_eq!(vmbed_config_new_linux(kernel.as_ptr(), made, null_mut()), OK);
            }
            vmbed_config_free(freed);
            assert_eq!(vmbed_switch_new(null_mut(), &mut switch, null_mut()), OK);
            let name = c"first".as_ptr();
            assert_eq!(vmbed_switch_add_port(switch, name, null_mut(), &mut port, null_mut()), OK);
        }
        Self { config, freed, switch, port, ports: 1, depth: Depth::default() }
    }

    /// Calls, and looks at the error: it is there exactly where the call failed, with a text.
    fn status(call: impl FnOnce(*mut Handle) -> i32) -> i32 {
        let mut error = std::ptr::dangling_mut();
        let status = call(&mut error);
        assert_eq!(error.is_null(), status == OK);
        // SAFETY: NULL or an error, whose text lives as long.
        unsafe {
            assert_eq!(vmbed_error_status(error), status);
            let message = std::ffi::CStr::from_ptr(vmbed_error_message(error));
            assert_eq!(message.is_empty(), status == OK, "{message:?}");
            vmbed_error_free(error);
        }
        status
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.int_in_range(0..=11u8)? {
            0 => self.disk(u),
            1 => self.net(u),
            2 => self.balloon(u),
            3 => self.backing(u),
            4 => self.switch(u),
            5 => self.port(u),
            6 => self.host(u),
            7 => self.statistics(u),
            8 => self.nothing(u),
            _ => self.form(u),
        }
    }

    fn given(&mut self, u: &mut Unstructured<'_>, kind: &Kind, fields: &[(usize, Vec<u8>)]) -> Result<Given> {
        let given = Given::new(u, kind, fields)?;
        self.depth.older += u32::from(given.older);
        self.depth.newer += u32::from(given.newer);
        Ok(given)
    }

    /// NULL where there must be something, and a handle that was freed.
    fn nothing(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let calls: [Add; 4] =
            [vmbed_config_add_disk, vmbed_config_add_net, vmbed_config_set_balloon, vmbed_config_set_backing];
        let call = *u.choose(&calls)?;
        let sound = [136u64; 18];
        let structure = sound.as_ptr().cast::<c_void>();
        let before = crossed::config(self.config).unwrap();
        for (handle, structure) in
            [(null_mut(), structure), (self.config, std::ptr::null()), (self.freed, structure)]
        {
            // SAFETY: NULL, or what the header wants; a handle that was freed stays good to ask.
            assert_eq!(Self::status(|error| unsafe { call(handle, structure, error) }), INVALID);
        }
        assert_eq!(crossed::config(self.config).unwrap(), before);
        (self.depth.null, self.depth.freed) = (self.depth.null + 2, self.depth.freed + 1);
        Ok(())
    }

    /// Whether it is to cross: then `expected` is what it becomes.
    fn outcome<T>(&mut self, given: &Given, expected: Option<T>, status: i32) -> Option<T> {
        let (wanted, counter) = match (given.refusal, &expected) {
            (Some(INVALID), _) => (INVALID, &mut self.depth.sizes),
            (Some(other), _) => (other, &mut self.depth.unknown),
            (None, None) => (INVALID, &mut self.depth.values),
            (None, Some(_)) => (OK, &mut self.depth.statistics),
        };
        assert_eq!(status, wanted, "a size of {}", given.size);
        if status == OK {
            return expected;
        }
        *counter += 1;
        None
    }

    fn disk(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let (path, serial) = (Text::new(u, &PATHS)?, Text::new(u, &["serial", "0123456789012345678901"])?);
        let (place, data) = (Text::new(u, &PLACES)?, Text::new(u, &PATHS)?);
        let below = Text(Some(c"below".to_owned()));
        let secret = Text(Some(c"secret".to_owned()));
        let pointer = |text: &Text| text.0.as_ref().map_or(0, |text| text.as_ptr() as u64);
        // Two files that it is based on, each 16 bytes; the second one's format may be none.
        let (second, spare) = (number(u, 1)?, u.ratio(1u8, 10u8)?);
        let backing = [pointer(&below), 0, pointer(&below), u64::from(second) | u64::from(spare) << 32];
        let passphrases = [pointer(&secret), pointer(&secret)];
        let (files, keys) = (u.int_in_range(0..=2)?, u.int_in_range(0..=2)?);
        let (file_count, key_count) = (count(u, files)?, count(u, keys)?);
        let array =
            |u: &mut Unstructured<'_>, at: *const u64| Ok(if u.ratio(1u8, 8u8)? { 0 } else { at as u64 });
        let (files_at, keys_at) = (array(u, backing.as_ptr())?, array(u, passphrases.as_ptr())?);
        let fields = [
            path.field(8),
            serial.field(16),
            place.field(24),
            numbers(32, &[number(u, 1)?, if u.ratio(1u8, 16u8)? { u.arbitrary()? } else { 0 }]),
            numbers(
                40,
                &[number(u, 1)?, number(u, 3)?, number(u, 2)?, number(u, 17)?, number(u, 1)?, number(u, 1)?],
            ),
            rate(u, 64)?,
            words(96, &[files_at, file_count]),
            data.field(112),
            words(120, &[keys_at, key_count]),
        ];
        let given = self.given(u, &DISK, &fields)?;
        let expected = disk_config(&given, [&path, &serial, &place, &data], (second, spare));
        // SAFETY: a structure as long as its size says, whose pointers are good.
        let status =
            Self::status(|error| unsafe { vmbed_config_add_disk(self.config, given.pointer(), error) });
        if let Some(disk) = self.outcome(&given, expected, status) {
            assert_eq!(crossed::config(self.config).unwrap().disks.last(), Some(&disk));
            self.depth.disks += 1;
        }
        Ok(())
    }

    fn net(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let (tap, address) = (Text::new(u, &["tap0", ""])?, Text::new(u, &MACS)?);
        let (place, stream) = (Text::new(u, &PLACES)?, Text::new(u, &PATHS)?);
        let fields = [
            tap.field(8),
            address.field(16),
            place.field(24),
            numbers(32, &[number(u, 70_000)?, number(u, 100)?, number(u, 1)?, number(u, 17)?]),
            rate(u, 48)?,
            rate(u, 80)?,
            stream.field(112),
            numbers(120, &[number(u, 3)?, u32::from(u.ratio(1u8, 10u8)?)]),
        ];
        let given = self.given(u, &NET, &fields)?;
        let expected = || {
            let mut net = NetConfig::attached();
            net.tap = maybe(given.text(8, &tap), utf8)?;
            net.mac = maybe(given.text(16, &address), mac)?;
            net.pci = maybe(given.text(24, &place), pci)?;
            let or_none = |at: usize| Some(given.number(at)).filter(|number| *number > 0);
            net.mtu = or_none(32).map(u16::try_from).transpose().ok()?;
            (net.speed, net.link) = (or_none(36), given.number(40) == 0);
            net.queues = given.number(44).max(1).try_into().ok()?;
            (net.receive_rate, net.send_rate) = (given.rate(48), given.rate(80));
            net.stream = given.text(112, &stream).map(file);
            let known = [Vhost::Off, Vhost::IfPresent, Vhost::Required];
            net.vhost = *known.get(given.number(120) as usize).filter(|_| given.number(124) == 0)?;
            Some(net)
        };
        // SAFETY: as above.
        let status =
            Self::status(|error| unsafe { vmbed_config_add_net(self.config, given.pointer(), error) });
        if let Some(net) = self.outcome(&given, expected(), status) {
            assert_eq!(crossed::config(self.config).unwrap().nets.last(), Some(&net));
            self.depth.nets += 1;
        }
        Ok(())
    }

    fn balloon(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let place = Text::new(u, &PLACES)?;
        let reserved = if u.ratio(1u8, 10u8)? { u.arbitrary()? } else { 0 };
        let fields = [place.field(8), numbers(16, &[number(u, 1)?, number(u, 1)?, number(u, 1)?, reserved])];
        let given = self.given(u, &BALLOON, &fields)?;
        let expected = || {
            let [keep, silent, hinting] = [16, 20, 24].map(|at| given.number(at) != 0);
            let pci = maybe(given.text(8, &place), pci).filter(|_| given.number(28) == 0)?;
            let mut balloon = BalloonConfig::default();
            (balloon.deflate_on_oom, balloon.reporting) = (!keep, !silent);
            (balloon.hinting, balloon.pci) = (hinting, pci);
            Some(balloon)
        };
        // SAFETY: as above.
        let status =
            Self::status(|error| unsafe { vmbed_config_set_balloon(self.config, given.pointer(), error) });
        if let Some(balloon) = self.outcome(&given, expected(), status) {
            assert_eq!(crossed::config(self.config).unwrap().balloon, Some(balloon));
            self.depth.balloons += 1;
        }
        Ok(())
    }

    fn backing(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let nodes = [0u32, 7, u32::MAX];
        let there = u.int_in_range(0..=3)?;
        let start = nodes.as_ptr() as u64;
        // Numbers do not lie at odd addresses.
        let at = *u.choose(&[0, start, start, start, start + 1])?;
        let fields = [
            numbers(8, &[number(u, 3)?, number(u, 2)?, number(u, 1)?, number(u, 1)?]),
            words(24, &[at, count(u, there)?]),
        ];
        let given = self.given(u, &BACKING, &fields)?;
        let expected = || {
            let kinds =
                [BackingKind::Memfd, BackingKind::Anonymous, BackingKind::Huge2M, BackingKind::Huge1G];
            let huge = [HugePages::Auto, HugePages::Always, HugePages::Never];
            let mut backing = BackingConfig::default();
            backing.kind = *kinds.get(given.number(8) as usize)?;
            backing.huge = *huge.get(given.number(12) as usize)?;
            (backing.prefault, backing.mergeable) = (given.number(16) != 0, given.number(20) != 0);
            let count = given.word(32) as usize;
            backing.numa_nodes = match given.word(24) {
                _ if count == 0 => Vec::new(),
                odd if odd % 4 != 0 || odd == 0 => return None,
                _ => nodes.get(..count)?.to_vec(),
            };
            Some(backing)
        };
        // SAFETY: as above.
        let status =
            Self::status(|error| unsafe { vmbed_config_set_backing(self.config, given.pointer(), error) });
        if let Some(backing) = self.outcome(&given, expected(), status) {
            assert_eq!(crossed::config(self.config).unwrap().backing, backing);
            self.depth.backings += 1;
        }
        Ok(())
    }

    fn switch(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        // Addresses cost memory: what is too many is refused before any is taken.
        let addresses = *u.choose(&[0u32, 1, 100, 1 << 21, u32::MAX])?;
        let fields = [numbers(8, &[addresses, number(u, 1000)?])];
        let given = self.given(u, &SWITCH, &fields)?;
        let mut options = SwitchOptions::default();
        if addresses > 0 {
            options.addresses = addresses;
        }
        if given.number(12) > 0 {
            options.ageing = std::time::Duration::from_secs(given.number(12).into());
        }
        let mut made = null_mut();
        // SAFETY: as above; a place for the result.
        let status = Self::status(|error| unsafe { vmbed_switch_new(given.pointer(), &mut made, error) });
        let expected = Switch::new(&options).ok();
        assert_eq!(made.is_null(), status != OK);
        // SAFETY: NULL or a switch.
        unsafe { vmbed_switch_free(made) };
        if self.outcome(&given, expected, status).is_some() {
            self.depth.switches += 1;
        }
        Ok(())
    }

    fn port(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let macs = Text::new(u, &[MACS[0], "52:54:00:12:34:56  02:00:00:00:00:01", " ", "02:00"])?;
        let addresses = Text::new(u, &["192.0.2.7 2001:db8::/64", "", "10.0.0.0/33", "x"])?;
        let trunk = [1u32, 10, number(u, 5000)?];
        let length = u.int_in_range(0..=3u32)?;
        let at = if u.arbitrary()? { 0 } else { trunk.as_ptr() as u64 };
        let fields = [
            numbers(8, &[number(u, 4096)?, length]),
            words(16, &[at]),
            numbers(24, &[number(u, 1)?, number(u, 1)?, number(u, 2000)?, number(u, 1)?]),
            macs.field(40),
            addresses.field(48),
            rate(u, 56)?,
            rate(u, 88)?,
            rate(u, 120)?,
        ];
        let given = self.given(u, &PORT, &fields)?;
        if self.ports >= 30 {
            return Ok(());
        }
        let expected = port_options(&given, &trunk[..length as usize], &macs, &addresses);
        let mut made = null_mut();
        let (switch, name) = (self.switch, c"port".as_ptr());
        // SAFETY: as above; a place for the result.
        let status = Self::status(|error| unsafe {
            vmbed_switch_add_port(switch, name, given.pointer(), &mut made, error)
        });
        assert_eq!(made.is_null(), status != OK);
        if let Some(port) = self.outcome(&given, expected, status) {
            assert_eq!(crossed::port_options(made).unwrap(), port);
            (self.depth.ports, self.ports) = (self.depth.ports + 1, self.ports + 1);
        }
        // SAFETY: NULL or a port.
        unsafe { vmbed_port_free(made) };
        Ok(())
    }

    fn host(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let kvm = Text::new(u, &["/dev/kvm", "/nowhere"])?;
        let cores = [1u32, 5, 9];
        let there = u.int_in_range(0..=3)?;
        let at = if u.ratio(1u8, 5u8)? { 0 } else { cores.as_ptr() as u64 };
        let mut numbers = [0u64; 9];
        for number in &mut numbers {
            *number = if u.arbitrary()? { 0 } else { u.arbitrary()? };
        }
        let fields = [kvm.field(8), words(16, &numbers), words(88, &[at, count(u, there)?])];
        let given = self.given(u, &HOST, &fields)?;
        let made = crossed::host(given.pointer());
        let status = match &made {
            Ok(_) => OK,
            Err(error) if error.kind() == vmbed::ErrorKind::Unsupported => UNSUPPORTED,
            Err(_) => INVALID,
        };
        let count = given.word(96) as usize;
        let cores = match given.word(88) {
            _ if count == 0 => Some(Vec::new()),
            0 => None,
            _ => cores.get(..count).map(<[u32]>::to_vec),
        };
        let Some(cores) = self.outcome(&given, cores, status) else { return Ok(()) };
        let host = made.unwrap();
        let or = |at: usize, default: u64| if given.word(at) == 0 { default } else { given.word(at) };
        let some = |at: usize| Some(given.word(at)).filter(|word| *word > 0);
        assert_eq!(host.kvm, file(given.text(8, &kvm).unwrap_or(b"/dev/kvm")));
        assert_eq!(host.memory.map(|bytes| bytes.get()), some(16));
        assert_eq!(host.memory_reserved.get(), or(24, 512 << 20));
        let ratio = f64::from_bits(given.word(32));
        assert_eq!(host.memory_ratio.to_bits(), if ratio == 0.0 { 1f64 } else { ratio }.to_bits());
        let ratio = f64::from_bits(given.word(40));
        assert_eq!(host.vcpu_ratio.map(f64::to_bits), (ratio != 0.0).then_some(ratio.to_bits()));
        assert_eq!((host.memory_min_unit.get(), host.memory_step.get()), (or(48, 1), or(64, 1)));
        assert_eq!(host.memory_max_unit.map(|bytes| bytes.get()), some(56));
        assert_eq!(
            (host.swap.get(), host.reaction_time.as_millis()),
            (given.word(72), given.word(80).into())
        );
        assert_eq!(host.dedicated_cpus, cores);
        self.depth.hosts += 1;
        Ok(())
    }

    /// A structure that is filled: as much as its size says, zeroes where nothing is known, and nothing behind.
    fn statistics(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let mut given = self.given(u, &STATISTICS, &[])?;
        let fill = 0x5a5a_5a5a_5a5a_5a5a;
        given.words[1..].fill(fill);
        // What lies behind is the program's own.
        given.words.push(fill);
        let (port, size, known) = (self.port, given.size, STATISTICS.full / 8);
        let place = given.words.as_mut_ptr().cast();
        // SAFETY: as above; it may be written.
        let status = Self::status(|error| unsafe { vmbed_port_get_statistics(port, place, error) });
        assert_eq!(given.words[0], size as u64, "its size stays");
        let bytes: Vec<u8> = given.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        // What is filled has no fields that it could not know.
        let refused = given.refusal == Some(INVALID);
        assert_eq!(status, if refused { INVALID } else { OK });
        if refused {
            self.depth.sizes += 1;
            assert!(bytes[8..].iter().all(|byte| *byte == 0x5a));
            return Ok(());
        }
        assert!(given.words[1..known].iter().all(|word| *word == 0), "nothing has passed");
        assert!(bytes[8 * known..size].iter().all(|byte| *byte == 0), "what is not known is zero");
        assert!(bytes[size..].iter().all(|byte| *byte == 0x5a), "nothing is written behind it");
        self.depth.statistics += 1;
        Ok(())
    }
}

impl Caller {
    /// Any other structure: what one program has given, another gets, as far as both know it.
    fn form(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let index = u.choose_index(FORMS.len())?;
        let form: &Form = &FORMS[index];
        let first = GROWN.iter().find(|(name, _)| *name == form.name).map_or(form.full, |(_, first)| *first);
        let kind = Kind { first, full: form.full, pointers: &[] };
        let mut bytes = vec![0; form.full - 8];
        u.fill_buffer(&mut bytes)?;
        let (from, mut to) = (self.given(u, &kind, &[(8, bytes)])?, self.given(u, &kind, &[])?);
        let fill = 0x5a5a_5a5a_5a5a_5a5a;
        to.words[1..].fill(fill);
        // What lies behind is the program's own.
        to.words.push(fill);
        let result = form.cross(from.pointer(), to.words.as_mut_ptr().cast());
        let status = match &result {
            Ok(()) => OK,
            Err(error) if error.kind() == vmbed::ErrorKind::Unsupported => UNSUPPORTED,
            Err(_) => INVALID,
        };
        // What is filled has no fields that it could not know.
        let refused = to.refusal.filter(|status| *status == INVALID);
        assert_eq!(
            status,
            from.refusal.or(refused).unwrap_or(OK),
            "{}: {} to {}",
            form.name,
            from.size,
            to.size
        );
        assert_eq!(to.words[0], to.size as u64, "its size stays");
        let bytes: Vec<u8> = to.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        if status != OK {
            *(if status == INVALID { &mut self.depth.sizes } else { &mut self.depth.unknown }) += 1;
            assert!(bytes[8..].iter().all(|byte| *byte == 0x5a));
            return Ok(());
        }
        let known = to.size.min(form.full);
        assert_eq!(bytes[8..known], from.seen[8..known], "{}: {} to {}", form.name, from.size, to.size);
        assert!(bytes[known..to.size].iter().all(|byte| *byte == 0), "what is not known is zero");
        assert!(bytes[to.size..].iter().all(|byte| *byte == 0x5a), "nothing is written behind it");
        self.depth.forms[index] += 1;
        Ok(())
    }
}

/// The same in Rust: of `texts` path, serial number, place and data file; of the second file that it is based on
/// the format, and whether that is spoilt.
fn disk_config(given: &Given, texts: [&Text; 4], (second, spoilt): (u32, bool)) -> Option<DiskConfig> {
    let [path, serial, place, data] = texts;
    let mut disk = DiskConfig::attached();
    disk.path = given.text(8, path).map(file);
    disk.serial = maybe(given.text(16, serial), utf8)?.unwrap_or_default();
    disk.pci = maybe(given.text(24, place), pci)?;
    disk.readonly = given.number(32) != 0;
    let formats = [DiskFormat::Raw, DiskFormat::Qcow2];
    disk.format = *formats.get(given.number(40) as usize).filter(|_| given.number(36) == 0)?;
    let caches = [CacheMode::Writeback, CacheMode::Writethrough, CacheMode::Direct, CacheMode::Unsafe];
    disk.cache = *caches.get(given.number(44) as usize)?;
    let engines = [DiskEngine::Auto, DiskEngine::Sync, DiskEngine::IoUring];
    disk.engine = *engines.get(given.number(48) as usize)?;
    disk.queues = given.number(52).clamp(1, u16::MAX.into()) as u16;
    (disk.discard, disk.lock) = (given.number(56) == 0, given.number(60) == 0);
    disk.rate = given.rate(64);
    let list = |at: usize| {
        let (pointer, count) = (given.word(at), given.word(at + 8));
        (count == 0 || pointer != 0 && count <= 2).then_some(count)
    };
    for index in 0..list(96)? {
        let number = if index == 0 { 0 } else { second };
        let format = formats.get(number as usize).filter(|_| index == 0 || !spoilt)?;
        disk = disk.based_on("below", *format);
    }
    disk.data_file = given.text(112, data).map(file);
    for _ in 0..list(120)? {
        disk = disk.unlocked_by("secret");
    }
    Some(disk)
}

/// The same in Rust, which may say that it will not do.
fn port_options(given: &Given, trunk: &[u32], macs: &Text, addresses: &Text) -> Option<PortOptions> {
    let small = |number: u32| u16::try_from(number).ok();
    let mut port = PortOptions::default();
    port.vlan = match (given.word(16), trunk.len(), given.number(8)) {
        (0, 0, vlan) => PortVlan::Access(small(vlan.max(1))?),
        (0, ..) => return None,
        (_, _, native) => {
            let vlans = trunk.iter().map(|vlan| small(*vlan));
            let native = if native == 0 { None } else { Some(small(native)?) };
            PortVlan::Trunk { vlans: vlans.collect::<Option<_>>()?, native }
        }
    };
    (port.isolated, port.unknown_unicast) = (given.number(24) != 0, given.number(28) == 0);
    port.max_addresses = match given.number(32) {
        0 => 1024,
        most => most,
    };
    port.guard.router = given.number(36) != 0;
    let list = utf8(given.text(40, macs).unwrap_or_default())?;
    port.guard.macs = list.split_whitespace().map(|text| mac(text.as_bytes())).collect::<Option<_>>()?;
    let list = maybe(given.text(48, addresses), utf8)?;
    let parse = |list: String| {
        list.split_whitespace().map(|t| t.parse::<IpPrefix>().ok()).collect::<Option<Vec<_>>>()
    };
    port.guard.addresses = match list.map(parse) {
        Some(parsed) => Some(parsed?),
        None => None,
    };
    (port.rate_in, port.rate_out) = (given.rate(56), given.rate(88));
    port.storm = match given.rate(120) {
        storm if storm.is_none() => RateLimit::NONE.ops(10_000, 2_000),
        storm if storm.ops_per_second == u64::MAX => {
            RateLimit::NONE.bytes(storm.bytes_per_second, storm.bytes_burst)
        }
        storm => storm,
    };
    // What Rust says of it.
    Switch::new(&SwitchOptions::default()).unwrap().add_port("other", &port).ok()?;
    Some(port)
}
