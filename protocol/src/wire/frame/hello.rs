//! HELLO: the first frame of each side on the control QUIC stream (spec CONN-4).

use bytes::Bytes;

use crate::error::ProtocolError;
use crate::registry::{MAX_TOKEN, hello};
use crate::session::Instance;
use crate::wire::{Body, Params, Reader, Writer};

/// What each side says first, without waiting for the other. All fields are parameters; absent ones have the value
/// that the registry names as default.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Hello {
    /// 128-bit random id of one client installation or tab. Clients must send it; servers do not.
    pub instance: Option<Instance>,
    /// Software name and version, for logs only.
    pub agent: Option<Bytes>,
    /// Capability token of the client.
    pub token: Option<Bytes>,
    /// Bytes of one bulk QUIC stream that the peer may send beyond what was credited.
    pub bulk_window: Option<u64>,
    /// Bulk QUIC streams that the sender of this HELLO lets the peer have open towards it.
    pub bulk_streams: Option<u64>,
    /// Longest frame body accepted.
    pub max_frame: Option<u64>,
    /// Longest record accepted.
    pub max_record: Option<u64>,
    /// Most records of a batch.
    pub max_batch_records: Option<u64>,
    /// Most bytes of a batch.
    pub max_batch_bytes: Option<u64>,
    /// Batches of one producer that may be unacknowledged.
    pub producer_window: Option<u64>,
    /// Attachments that one connection may have open.
    pub max_attachments: Option<u64>,
}

crate::kept::keeps!(Hello, instance agent bulk_window bulk_streams max_frame max_record max_batch_records max_batch_bytes producer_window max_attachments, keeps token);

impl Body for Hello {
    const KIND: u64 = 0x00;

    fn put(&self, w: &mut Writer) {
        let mut params = Params::default();
        if let Some(instance) = &self.instance {
            params.insert(hello::INSTANCE, Bytes::copy_from_slice(&instance.0));
        }
        if let Some(agent) = &self.agent {
            params.insert(hello::AGENT, agent.clone());
        }
        if let Some(token) = &self.token {
            params.insert(hello::TOKEN, token.clone());
        }
        for (id, value) in [
            (hello::BULK_WINDOW, self.bulk_window),
            (hello::BULK_STREAMS, self.bulk_streams),
            (hello::MAX_FRAME, self.max_frame),
            (hello::MAX_RECORD, self.max_record),
            (hello::MAX_BATCH_RECORDS, self.max_batch_records),
            (hello::MAX_BATCH_BYTES, self.max_batch_bytes),
            (hello::PRODUCER_WINDOW, self.producer_window),
            (hello::MAX_ATTACHMENTS, self.max_attachments),
        ] {
            if let Some(value) = value {
                params.insert_varint(id, value);
            }
        }
        params.put(w);
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let mut params = Params::get(r)?;
        let instance = match params.remove(hello::INSTANCE) {
            Some(value) => {
                let id = value.as_ref().try_into();
                Some(Instance(id.map_err(|_| ProtocolError::malformed("instance is not 16 bytes"))?))
            }
            None => None,
        };
        let token = params.remove(hello::TOKEN);
        if token.as_ref().is_some_and(|token| token.len() > MAX_TOKEN) {
            return Err(ProtocolError::malformed("token exceeds its limit"));
        }
        let hello = Self {
            instance,
            agent: params.remove(hello::AGENT),
            token,
            bulk_window: params.remove_varint(hello::BULK_WINDOW)?,
            bulk_streams: params.remove_varint(hello::BULK_STREAMS)?,
            max_frame: params.remove_varint(hello::MAX_FRAME)?,
            max_record: params.remove_varint(hello::MAX_RECORD)?,
            max_batch_records: params.remove_varint(hello::MAX_BATCH_RECORDS)?,
            max_batch_bytes: params.remove_varint(hello::MAX_BATCH_BYTES)?,
            producer_window: params.remove_varint(hello::PRODUCER_WINDOW)?,
            max_attachments: params.remove_varint(hello::MAX_ATTACHMENTS)?,
        };
        params.finish()?;
        Ok(hello)
    }
}
