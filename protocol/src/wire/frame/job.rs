//! JOB: somebody is to be told of something (spec NOTE-5).

use crate::session::{Incarnation, RequestId, SessionName};
use crate::wire::{Label, Subject};

plain_frame! {
    /// Sent to a worker, which answers with DONE.
    Job = 0x68, {
        /// Number of the job on this QUIC stream.
        number: u64,
        /// The session.
        session: SessionName,
        /// Its incarnation.
        incarnation: Incarnation,
        /// Seq of the record that caused it.
        job: u64,
        /// The rule that it is by.
        rule: Label,
        /// Whom to tell.
        principal: Subject,
        /// The kind of that record.
        cause: u64,
        /// When that was, in milliseconds since the Unix epoch.
        time: u64,
        /// The request that it is about.
        request: Option<RequestId>,
    }
}
