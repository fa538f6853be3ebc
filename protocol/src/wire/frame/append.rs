//! APPEND: one batch (spec PROD-3).

use bytes::Bytes;

use crate::error::ProtocolError;
use crate::registry::append;
use crate::wire::{Body, Params, Reader, Writer};

/// A batch of records: appended whole, contiguous and in order, or not at all.
#[derive(Clone, PartialEq, Eq)]
pub struct Append {
    /// The producer's sequence of the batch.
    pub sequence: u64,
    /// Records of the batch.
    pub count: u64,
    /// The records, each as `length | record bytes`.
    pub records: Bytes,
    /// Epoch of the run that the batch is part of (spec RUN-3).
    pub run_epoch: Option<u64>,
}

crate::kept::keeps!(Append, sequence count run_epoch, keeps records);

impl Body for Append {
    const KIND: u64 = 0x3e;

    fn put(&self, w: &mut Writer) {
        w.varint(self.sequence);
        w.varint(self.count);
        w.bytes(&self.records);
        let mut params = Params::default();
        if let Some(epoch) = self.run_epoch {
            params.insert_varint(append::RUN_EPOCH, epoch);
        }
        params.put(w);
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let (sequence, count, records) = (r.varint()?, r.varint()?, r.bytes(usize::MAX)?);
        let mut params = Params::get(r)?;
        let run_epoch = params.remove_varint(append::RUN_EPOCH)?;
        params.finish()?;
        Ok(Self { sequence, count, records, run_epoch })
    }
}
