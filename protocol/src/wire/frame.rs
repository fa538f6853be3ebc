//! The frame table: every type, its number and its file.

use bytes::Bytes;

use super::codec::{Reader, Writer};
use super::deframer::RawFrame;
use super::varint::varint_len;
use crate::error::{Code, ProtocolError};
use crate::registry::is_ignorable;

/// The body of one frame type: exactly one encoding per value.
pub trait Body: Sized {
    /// The frame type number.
    const KIND: u64;

    /// Appends the body to `w`.
    fn put(&self, w: &mut Writer);

    /// Reads the whole of `r` as a body. Errors: `FRAME_MALFORMED`, `FRAME_UNKNOWN` for a critical parameter,
    /// `NAME_INVALID` for a bad name.
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError>;
}

/// A frame whose fields follow each other and which defines no parameters of its own.
macro_rules! plain_frame {
    ($(#[$doc:meta])* $name:ident = $kind:expr, { $( $(#[$field_doc:meta])* $field:ident: $ty:ty, )* }) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq)]
        pub struct $name {
            $( $(#[$field_doc])* pub $field: $ty, )*
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.debug_struct(stringify!($name))
                    $( .field(stringify!($field), &$crate::wire::Shown(&self.$field)) )*
                    .finish()
            }
        }

        impl $crate::wire::Body for $name {
            const KIND: u64 = $kind;

            fn put(&self, _w: &mut $crate::wire::Writer) {
                $( $crate::wire::Field::put(&self.$field, _w); )*
            }

            fn get(r: &mut $crate::wire::Reader<'_>) -> Result<Self, $crate::ProtocolError> {
                $( let $field = <$ty as $crate::wire::Field>::get(r)?; )*
                $crate::wire::Params::get_none(r)?;
                Ok(Self { $($field),* })
            }
        }
    };
}

macro_rules! frames {
    ($( $module:ident::$name:ident $label:literal, )+) => {
        $( mod $module; )+
        $( pub use $module::*; )+

        /// Any frame.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[allow(missing_docs, reason = "each variant holds the struct of the same name, documented there")]
        pub enum Frame {
            $( $name($name), )+
        }

        impl Frame {
            /// Every frame type with its registry name, in the order of the table.
            pub const TYPES: &'static [(u64, &'static str)] = &[$( ($name::KIND, $label), )+];

            /// The frame type number.
            pub fn kind(&self) -> u64 {
                match self { $( Self::$name(_) => $name::KIND, )+ }
            }

            /// The registry name of the frame type.
            pub fn name(&self) -> &'static str {
                match self { $( Self::$name(_) => $label, )+ }
            }

            /// Reads a frame. `Ok(None)` means an unknown frame that must be skipped (spec WIRE-7).
            ///
            /// Errors: `FRAME_UNKNOWN` for an unknown critical type, and those of [`Body::get`].
            pub fn decode(raw: &RawFrame) -> Result<Option<Self>, ProtocolError> {
                let mut r = Reader::new(&raw.body);
                match raw.kind {
                    $( $name::KIND => Ok(Some(Self::$name($name::get(&mut r)?))), )+
                    kind if is_ignorable(kind) => Ok(None),
                    _ => Err(ProtocolError::new(Code::FRAME_UNKNOWN, "critical frame type is not known")),
                }
            }

            /// Appends `type | length | body` to `w`.
            pub fn put(&self, w: &mut Writer) {
                match self { $( Self::$name(body) => put_frame(body, w), )+ }
            }
        }

        $(
            impl From<$name> for Frame {
                fn from(body: $name) -> Self {
                    Self::$name(body)
                }
            }
        )+
    };
}

frames! {
    hello::Hello "HELLO",
    token::Token "TOKEN",
    authenticated::Authenticated "AUTHENTICATED",
    expiring::Expiring "EXPIRING",
    ping::Ping "PING",
    pong::Pong "PONG",
    goaway::GoAway "GOAWAY",
    credit::Credit "CREDIT",
    error::Error "ERROR",
    attach::Attach "ATTACH",
    attached::Attached "ATTACHED",
    open_producer::OpenProducer "OPEN_PRODUCER",
    producer::Producer "PRODUCER",
    define_stream::DefineStream "DEFINE_STREAM",
    stream::Stream "STREAM",
    ack::Ack "ACK",
    refused::Refused "REFUSED",
    subscribe::Subscribe "SUBSCRIBE",
    unsubscribe::Unsubscribe "UNSUBSCRIBE",
    close_session::CloseSession "CLOSE_SESSION",
    closed::Closed "CLOSED",
    delete_session::DeleteSession "DELETE_SESSION",
    deleted::Deleted "DELETED",
    trim::Trim "TRIM",
    trimmed::Trimmed "TRIMMED",
    subscribed::Subscribed "SUBSCRIBED",
    snapshot::Snapshot "SNAPSHOT",
    delivery::Delivery "DELIVERY",
    gap::Gap "GAP",
    tail::Tail "TAIL",
    compacted::Compacted "COMPACTED",
    produce::Produce "PRODUCE",
    append::Append "APPEND",
    join::Join "JOIN",
    joined::Joined "JOINED",
    update::Update "UPDATE",
    leave::Leave "LEAVE",
    left::Left "LEFT",
    configure::Configure "CONFIGURE",
    configured::Configured "CONFIGURED",
    start_run::StartRun "START_RUN",
    take_run::TakeRun "TAKE_RUN",
    granted::Granted "GRANTED",
    renew::Renew "RENEW",
    release::Release "RELEASE",
    signal::Signal "SIGNAL",
    signalled::Signalled "SIGNALLED",
    listen::Listen "LISTEN",
    early::Early "EARLY",
    set_rule::SetRule "SET_RULE",
    resume::Resume "RESUME",
    resumed::Resumed "RESUMED",
    pull::Pull "PULL",
    job::Job "JOB",
    done::Done "DONE",
    withdrawn::Withdrawn "WITHDRAWN",
    mint::Mint "MINT",
    minted::Minted "MINTED",
    list::List "LIST",
    listed::Listed "LISTED",
}

impl Frame {
    /// The frame alone, as bytes.
    pub fn to_bytes(&self) -> Bytes {
        let mut w = Writer::new();
        self.put(&mut w);
        w.freeze()
    }
}

/// Appends `type | length | body` of one frame to `w`.
pub fn put_frame<B: Body>(body: &B, w: &mut Writer) {
    let mut inner = Writer::new();
    body.put(&mut inner);
    w.varint(B::KIND);
    w.bytes(inner.as_slice());
}

/// Bytes of `type | length` before a body of `len` bytes.
pub fn prefix_len(kind: u64, len: usize) -> usize {
    varint_len(kind) + varint_len(len as u64)
}

/// Writes the reserved frame number `n` with `body`: every receiver skips it (spec WIRE-8).
pub fn put_grease(n: u32, body: &[u8], w: &mut Writer) {
    w.varint(crate::registry::grease(n));
    w.bytes(body);
}
