//! Bytes to frames and back: canonical, bounded, without state but for the [`Deframer`].
//!
//! A frame is `type | length | body`, all integers QUIC varints in their shortest form (spec WIRE-1..4). Every frame
//! has one file under `frame/` that holds its fields, its layout and its codec. A frame has exactly one encoding, so that golden vectors are
//! byte-exact.

mod codec;
mod deframer;
mod field;
mod frame;
mod params;
mod varint;

pub(crate) use codec::text_type;
pub use codec::{Detail, Label, Reader, Subject, Writer};
pub use deframer::{Deframer, RawFrame};
pub(crate) use field::{Field, Shown};
pub use frame::*;
pub use params::{Param, Params};
pub use varint::{MAX_VARINT, varint_len};
