//! Frames with numbers, for `landing.rs`: each is known wherever it turns up.

/// Behind a frame's number: no frame has it by chance.
const MARK: [u8; 4] = *b"mark";

/// A frame that the driver was handed, without its header.
pub struct Came {
    pub bytes: Vec<u8>,
    pub buffers: u16,
    /// What is left to cut.
    pub gso: u8,
}

impl Came {
    /// One that the switch has cut off a longer frame.
    pub fn is_segment(&self) -> bool {
        self.gso == 0 && self.bytes.get(12..14) == Some(&[8, 0])
    }
}

/// The address of the station of that number.
pub fn address(index: u8) -> [u8; 6] {
    [2, 0, 0, 0, 1, index]
}

/// Bytes that differ from frame to frame and from place to place.
pub fn plain(number: u32, length: usize) -> Vec<u8> {
    let mut frame: Vec<_> = (0..length as u32).map(|i| (i + i / 251 + number) as u8).collect();
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame[14..18].copy_from_slice(&number.to_be_bytes());
    frame[18..22].copy_from_slice(&MARK);
    frame
}

/// TCP over IPv4, to be cut into segments. Its number is where IP has identification and fragments, and behind the headers.
pub fn segments(number: u32, length: usize) -> Vec<u8> {
    let mut frame = plain(number, length.clamp(100, 65_000));
    let total = (frame.len() as u16 - 14).to_be_bytes();
    frame[12..26].copy_from_slice(&[8, 0, 0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, 6, 0, 0]);
    frame[26..34].copy_from_slice(&[192, 0, 2, 1, 192, 0, 2, 2]);
    frame[34..54].fill(0);
    frame[46] = 5 << 4;
    frame[54..58].copy_from_slice(&number.to_be_bytes());
    frame[58..62].copy_from_slice(&MARK);
    frame
}

/// A frame's number.
pub fn number(frame: &[u8]) -> Option<u32> {
    let at = [14, 54].into_iter().find(|at| frame.get(at + 4..at + 8) == Some(&MARK))?;
    Some(u32::from_be_bytes(frame[at..at + 4].try_into().ok()?))
}
