//! What must not be seen in a log: payloads, tokens, signatures. Their `Debug` output says how long they are (spec, section 4.3).

use core::fmt;

use bytes::{Bytes, BytesMut};

/// Something of which only the length is shown.
pub(crate) trait Kept {
    /// Its length; `None` where it is not there.
    fn kept(&self) -> Size;
}

/// Bytes that are not shown.
pub(crate) struct Size(Option<usize>);

impl fmt::Debug for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(size) => write!(f, "<{size} bytes>"),
            None => f.write_str("None"),
        }
    }
}

impl Kept for Bytes {
    fn kept(&self) -> Size {
        Size(Some(self.len()))
    }
}

impl Kept for BytesMut {
    fn kept(&self) -> Size {
        Size(Some(self.len()))
    }
}

impl Kept for Vec<u8> {
    fn kept(&self) -> Size {
        Size(Some(self.len()))
    }
}

impl<const N: usize> Kept for [u8; N] {
    fn kept(&self) -> Size {
        Size(Some(N))
    }
}

impl Kept for Option<Bytes> {
    fn kept(&self) -> Size {
        Size(self.as_ref().map(Bytes::len))
    }
}

/// Names and values of headers.
impl Kept for Vec<(Bytes, Bytes)> {
    fn kept(&self) -> Size {
        Size(Some(self.iter().map(|(name, value)| name.len() + value.len()).sum()))
    }
}

/// `Debug` of a struct that shows some fields and keeps others to itself.
macro_rules! keeps {
    ($name:ident, $( $shown:ident )*, keeps $( $kept:ident )+) => {
        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.debug_struct(stringify!($name))
                    $( .field(stringify!($shown), &self.$shown) )*
                    $( .field(stringify!($kept), &$crate::kept::Kept::kept(&self.$kept)) )+
                    .finish()
            }
        }
    };
}
pub(crate) use keeps;
