//! A kernel for tests of what reads kernels.

/// An ELF with a PVH entry: a segment of 4 KiB at 16 MiB, which begins with that code.
pub fn kernel(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 0x240];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(18, &62u16.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    for (at, kind, fields) in
        [(64, 1u32, [0x200u64, 0, 0x100_0000, 0x40, 0x1000]), (120, 4, [0x100, 0, 0, 20, 20])]
    {
        put(at, &kind.to_le_bytes());
        (0..).zip(fields).for_each(|(i, field)| put(at + 8 + 8 * i, &field.to_le_bytes()));
    }
    for (i, word) in [4u32, 4, 18].into_iter().enumerate() {
        put(0x100 + 4 * i, &word.to_le_bytes());
    }
    put(0x10c, b"Xen\0");
    put(0x110, &0x100_0000u32.to_le_bytes());
    put(0x200, code);
    image
}
