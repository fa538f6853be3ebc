//! PULL: a worker takes jobs (spec NOTE-5).

use bytes::Bytes;

plain_frame! {
    /// The first frame of a request stream. Answered by JOB for each job, as they become due, until the client ends the stream.
    Pull = 0x66, {
        /// Of sessions whose names start so.
        prefix: Bytes,
        /// How many jobs the worker takes at once.
        limit: u64,
    }
}
