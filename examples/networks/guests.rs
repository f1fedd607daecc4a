//! Guests that are asked whom they reach.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmbed::{Bytes, Host, LinuxBoot, NetConfig, Vm, VmBuilder, VmConfig};

use crate::Done;
use crate::base64::base64;

/// No guest takes longer for anything, even in the lab.
const LONG: Duration = Duration::from_secs(240);

/// How a guest gets its address.
pub enum Address {
    Fixed(&'static str),
    Dhcp,
}

/// Once it has an address it says so, and then answers each line `name address` with whether it gets an echo from there.
const SCRIPT: &str = r#"
ip link set lo up
ip link set eth0 up
ADDRESS
echo "address=$(ip -4 -o addr show eth0 | tr -s ' ' | cut -d' ' -f4)"
while read -r name to; do
	[ "$name" != end ] || break
	if ping -c 2 -W 2 "$to" >/dev/null 2>&1; then echo "reach=$name yes"; else echo "reach=$name no"; fi
done
"#;

/// What busybox's udhcpc calls with what it was told.
const DHCP: &str = r#"
printf '%s\n' '#!/bin/sh' '[ "$1" = bound ] || exit 0' 'ip addr add $ip/$mask dev $interface' 'ip route add default via $router' >/run/dhcp
chmod +x /run/dhcp
udhcpc -q -n -t 10 -i eth0 -s /run/dhcp >/dev/null 2>&1
"#;

pub struct Guest {
    pub name: &'static str,
    /// Without the length of its prefix.
    pub address: String,
    vm: Vm,
    console: Arc<Mutex<String>>,
}

impl Guest {
    /// Boots it; `attach` gives it its network where the card has none.
    pub fn boot(
        host: &Host,
        (kernel, initrd): (&str, &str),
        (name, address): (&'static str, &Address),
        card: NetConfig,
        attach: impl FnOnce(VmBuilder) -> VmBuilder,
    ) -> Done<Self> {
        let line = match address {
            Address::Fixed(address) => format!("ip addr add {address}/24 dev eth0"),
            Address::Dhcp => DHCP.to_owned(),
        };
        let script = SCRIPT.replace("ADDRESS", &line);
        let cmdline =
            format!("console=ttyS0 reboot=k panic=-1 quiet vmbed.run={}", base64(script.as_bytes()));
        let mut config = VmConfig::linux(LinuxBoot::new(kernel).initrd(initrd).cmdline(cmdline));
        config.name = name.to_owned();
        config.memory = Bytes::mib(96);
        config.nets.push(card);
        let console = Arc::new(Mutex::new(String::new()));
        let text = console.clone();
        let take = move |bytes: &[u8]| {
            let mut text = text.lock().unwrap_or_else(PoisonError::into_inner);
            text.push_str(&String::from_utf8_lossy(bytes).replace('\r', ""));
        };
        let vm = attach(host.builder(config).console_callback(take)).build()?;
        vm.start()?;
        Ok(Self { name, address: String::new(), vm, console })
    }

    /// Waits until the guest has said its address.
    pub fn ready(&mut self) -> Done<()> {
        let said = self.wait_for("address=")?;
        self.address = said.split('/').next().unwrap_or_default().to_owned();
        if self.address.is_empty() {
            return Err(format!("{} has no address:\n{}", self.name, self.text()).into());
        }
        Ok(())
    }

    /// Asks whether it reaches somebody; it answers when it likes.
    pub fn ask(&self, name: &str, address: &str) {
        self.vm.console_input(format!("{name} {address}\n").as_bytes());
    }

    pub fn answer(&self, name: &str) -> Done<bool> {
        Ok(self.wait_for(&format!("reach={name} "))? == "yes")
    }

    /// Has it end.
    pub fn end(self) -> Done<()> {
        self.vm.console_input(b"end\n");
        match self.vm.wait_timeout(LONG)? {
            Some(_) => Ok(()),
            None => Err(format!("waited {LONG:?} for {} to end:\n{}", self.name, self.text()).into()),
        }
    }

    fn text(&self) -> String {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What follows it on a line of the console, once that line is whole.
    fn wait_for(&self, prefix: &str) -> Done<String> {
        let end = Instant::now() + LONG;
        loop {
            let ended = self.vm.wait_timeout(Duration::from_millis(20))?;
            let text = format!("\n{}", self.text());
            if let Some((_, rest)) = text.split_once(&format!("\n{prefix}"))
                && let Some((value, _)) = rest.split_once('\n')
            {
                return Ok(value.trim().to_owned());
            }
            if ended.is_some() || Instant::now() > end {
                return Err(format!("waited for {prefix:?} on the console of {}:{text}", self.name).into());
            }
        }
    }
}

/// Asks each guest for each target, and prints what was expected, and what came. Whether they are the same.
pub fn table(guests: &[Guest], others: &[(&str, &str)], expected: impl Fn(&str, &str) -> bool) -> Done<bool> {
    let named = guests.iter().map(|guest| (guest.name, guest.address.as_str()));
    let targets: Vec<_> = named.chain(others.iter().copied()).collect();
    for guest in guests {
        for (name, address) in targets.iter().filter(|(name, _)| *name != guest.name) {
            guest.ask(name, address);
        }
    }
    print!("{:>12}", "from \\ to");
    targets.iter().for_each(|(name, _)| print!("{name:>14}"));
    println!();
    let mut same = true;
    for guest in guests {
        print!("{:>12}", guest.name);
        for (name, _) in &targets {
            if *name == guest.name {
                print!("{:>14}", "-");
                continue;
            }
            let (wanted, seen) = (expected(guest.name, name), guest.answer(name)?);
            let word = |reached| if reached { "yes" } else { "no" };
            same &= wanted == seen;
            let cell = format!("{}/{}{}", word(wanted), word(seen), if wanted == seen { "" } else { " !" });
            print!("{cell:>14}");
        }
        println!();
    }
    println!("{:>12}", "(expected/seen)");
    Ok(same)
}
