//! What guests' scripts are put on the kernel's command line with.

/// RFC 4648, for the kernel's command line.
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let word =
        |chunk: &[u8]| chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
    let digits = |chunk: &[u8]| {
        let (word, used) = (word(chunk), chunk.len());
        (0..4)
            .map(move |i| if i <= used { DIGITS[(word >> (18 - 6 * i) & 63) as usize] as char } else { '=' })
    };
    bytes.chunks(3).flat_map(digits).collect()
}
