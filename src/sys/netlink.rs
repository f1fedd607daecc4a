//! The kernel's interface to its network interfaces: rtnetlink(7).

use std::io;

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// A socket in the network namespace of the thread that opened it.
pub(crate) struct Route {
    socket: Socket,
    sequence: u32,
    /// An answer was not read to its end.
    is_amid: bool,
}

/// The kernel says no: with an errno, and in words where it has some.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub error: io::Error,
    pub words: String,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self { error, words: String::new() }
    }
}

fn misunderstood(what: impl std::fmt::Display) -> Refusal {
    io::Error::new(io::ErrorKind::InvalidData, format!("an answer of rtnetlink: {what}")).into()
}

impl Route {
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        again(|| socket.connect(&SocketAddr::new(0, 0)))?;
        // The kernel answers before it returns from being asked: an answer that is not there will not come.
        socket.set_non_blocking(true)?;
        // Older kernels have no words.
        let _ = socket.set_ext_ack(true).and_then(|()| socket.set_cap_ack(true));
        Ok(Self { socket, sequence: 0, is_amid: false })
    }

    /// Has the kernel do something; `flags` besides those of every request.
    pub fn tell(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), Refusal> {
        self.ask(message, flags | NLM_F_ACK).map(drop)
    }

    /// Everything that there is of a kind.
    pub fn dump(&mut self, message: &RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, Refusal> {
        // Somebody else may change it meanwhile, and something be missing: then once more.
        for _ in 0..9 {
            if let (answers, true) = self.exchange(message.clone(), NLM_F_DUMP)? {
                return Ok(answers);
            }
        }
        Ok(self.exchange(message.clone(), NLM_F_DUMP)?.0)
    }

    /// Sends a request, and collects what is answered until the acknowledgement.
    pub fn ask(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, Refusal> {
        Ok(self.exchange(message, flags)?.0)
    }

    /// The same, and whether it is of one moment.
    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(Vec<RouteNetlinkMessage>, bool), Refusal> {
        if std::mem::replace(&mut self.is_amid, true) {
            // The kernel knows one dump at a time, which is at its end when it has been read.
            while again(|| self.socket.recv_from_full()).is_ok() {}
        }
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        (header.sequence_number, header.flags) = (self.sequence, flags | NLM_F_REQUEST);
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        again(|| self.socket.send(&bytes, 0))?;
        let (mut answers, mut whole) = (Vec::new(), true);
        loop {
            let (packet, _) = again(|| self.socket.recv_from_full())?;
            let mut rest = &packet[..];
            while !rest.is_empty() {
                let answer = NetlinkMessage::deserialize(rest).map_err(misunderstood)?;
                // Padded to four bytes, but at the end.
                let length = (answer.header.length as usize).next_multiple_of(4).max(4);
                rest = rest.get(length..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    // What an earlier request did not wait for.
                    continue;
                }
                whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::Done(_) => {
                        self.is_amid = false;
                        return Ok((answers, whole));
                    }
                    NetlinkPayload::Error(error) => {
                        self.is_amid = false;
                        return outcome(&error).map(|()| (answers, whole));
                    }
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    _ => {}
                }
            }
        }
    }
}

/// Once more where a signal of the embedder's came between.
fn again<T>(call: impl Fn() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// An error of number 0 is an acknowledgement.
fn outcome(message: &ErrorMessage) -> Result<(), Refusal> {
    let Some(code) = message.code else { return Ok(()) };
    let error = io::Error::from_raw_os_error(code.get().unsigned_abs() as i32);
    Err(Refusal { error, words: words(&message.header) })
}

/// NLMSGERR_ATTR_MSG, among what follows the request's header.
fn words(bytes: &[u8]) -> String {
    const HEADER: usize = 16;
    const MESSAGE: u16 = 1;
    let mut rest = bytes.get(HEADER..).unwrap_or_default();
    while let [a, b, c, d, ..] = *rest {
        let (length, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
        let Some(value) = rest.get(4..length) else { break };
        if kind == MESSAGE {
            return String::from_utf8_lossy(value).trim_end_matches('\0').to_owned();
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_found() {
        let mut bytes = vec![0; 16];
        assert_eq!(words(&bytes), "");
        bytes.extend([8, 0, 2, 0, 9, 9, 9, 9, 8, 0, 1, 0, b'n', b'o', b'!', 0]);
        assert_eq!(words(&bytes), "no!");
        // Cut anywhere, or of any length, it is nothing worse than nothing.
        for end in 0..bytes.len() {
            words(&bytes[..end]);
        }
        for length in [0, 1, 3, 4, 5, 200] {
            bytes[16] = length;
            words(&bytes);
        }
    }
}
