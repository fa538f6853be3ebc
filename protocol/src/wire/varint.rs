//! QUIC variable-length integers (RFC 9000 section 16), shortest form required (spec WIRE-2).

/// Largest value of a varint: 2^62 - 1.
pub const MAX_VARINT: u64 = (1 << 62) - 1;

/// Bytes of the encoding of `value`: 1, 2, 4 or 8. Values above [`MAX_VARINT`] have none; they count as 8.
pub const fn varint_len(value: u64) -> usize {
    match value {
        0..=0x3f => 1,
        0x40..=0x3fff => 2,
        0x4000..=0x3fff_ffff => 4,
        _ => 8,
    }
}

/// Writes `value` in its shortest form into `out` and returns the bytes used.
///
/// A value above [`MAX_VARINT`] saturates: no field of the protocol can reach it (seqs and times are far below).
pub(super) fn encode(value: u64, out: &mut [u8; 8]) -> usize {
    let value = value.min(MAX_VARINT);
    match varint_len(value) {
        1 => {
            out[0] = value as u8;
            1
        }
        2 => {
            out[..2].copy_from_slice(&((value as u16) | 0x4000).to_be_bytes());
            2
        }
        4 => {
            out[..4].copy_from_slice(&((value as u32) | 0x8000_0000).to_be_bytes());
            4
        }
        _ => {
            out.copy_from_slice(&(value | 0xc000_0000_0000_0000).to_be_bytes());
            8
        }
    }
}

/// Outcome of reading a varint from the front of some bytes.
pub(super) enum Parsed {
    /// The value and the bytes it took.
    Value(u64, usize),
    /// The bytes end inside the varint.
    Incomplete,
    /// The varint is longer than it had to be.
    NotMinimal,
}

/// Reads the varint at the front of `bytes`.
pub(super) fn parse(bytes: &[u8]) -> Parsed {
    let Some(&first) = bytes.first() else {
        return Parsed::Incomplete;
    };
    let len = 1usize << (first >> 6);
    if len == 1 {
        return Parsed::Value(u64::from(first), 1);
    }
    let Some(rest) = bytes.get(1..len) else {
        return Parsed::Incomplete;
    };
    let value = rest.iter().fold(u64::from(first & 0x3f), |value, &byte| value << 8 | u64::from(byte));
    if varint_len(value) == len { Parsed::Value(value, len) } else { Parsed::NotMinimal }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_form_round_trips_at_every_border() {
        for value in [0, 1, 0x3f, 0x40, 0x3fff, 0x4000, 0x3fff_ffff, 0x4000_0000, MAX_VARINT] {
            let mut out = [0; 8];
            let len = encode(value, &mut out);
            assert_eq!(len, varint_len(value));
            assert!(matches!(parse(&out[..len]), Parsed::Value(v, l) if v == value && l == len));
            for short in 0..len {
                assert!(matches!(parse(&out[..short]), Parsed::Incomplete));
            }
        }
    }

    #[test]
    fn a_longer_form_than_needed_is_refused() {
        for bytes in [&[0x40, 0x3f][..], &[0x80, 0, 0x3f, 0xff], &[0xc0, 0, 0, 0, 0x3f, 0xff, 0xff, 0xff]] {
            assert!(matches!(parse(bytes), Parsed::NotMinimal));
        }
    }
}
