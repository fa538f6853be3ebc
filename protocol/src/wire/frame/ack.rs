//! ACK: batches are durable (spec PROD-7).

use crate::error::ProtocolError;
use crate::registry::PRODUCER_WINDOW;
use crate::wire::{Body, Params, Reader, Writer};

/// The seqs that one batch got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acked {
    /// Seq of the batch's first record.
    pub first: u64,
    /// Records of the batch.
    pub count: u64,
}

/// Sent on the attachment: the batches from `sequence` on are durable, each with the seqs that it got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ack {
    /// The producer.
    pub producer: u64,
    /// Sequence of the first batch acknowledged; the others follow without holes.
    pub sequence: u64,
    /// One entry per batch, 1 to 256.
    pub batches: Vec<Acked>,
}

impl Body for Ack {
    const KIND: u64 = 0x1c;

    fn put(&self, w: &mut Writer) {
        w.varint(self.producer);
        w.varint(self.sequence);
        w.varint(self.batches.len() as u64);
        for batch in &self.batches {
            w.varint(batch.first);
            w.varint(batch.count);
        }
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let producer = r.varint()?;
        let sequence = r.varint()?;
        let count = r.count(PRODUCER_WINDOW)?;
        if count == 0 {
            return Err(ProtocolError::malformed("ack of no batch"));
        }
        let batches = (0..count)
            .map(|_| Ok(Acked { first: r.varint()?, count: r.varint()? }))
            .collect::<Result<_, ProtocolError>>()?;
        Params::get_none(r)?;
        Ok(Self { producer, sequence, batches })
    }
}
