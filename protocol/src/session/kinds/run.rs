//! Runs: units of agent work, each under a lease (spec RUN), and what a session says about them.

use super::{Status, payload, words};
use crate::session::words::MessageId;
use crate::wire::Detail;

payload! {
    #[derive(Copy)]
    /// How the session treats runs and inputs from here on (spec RUN-2, RUN-9).
    SessionConfigured = SESSION_CONFIGURED, {
        /// How many runs may be active, and whether they are leased.
        runs: RunMode,
        /// What becomes of an input that comes while a run is active.
        inputs: InputPolicy,
    }
}

payload! {
    /// The run that the record names is active from here on, held by the record's author; its seq is the run's epoch (spec RUN-3).
    RunStart = RUN_START, {
        /// Milliseconds without a renewal after which the run is lost; 0 for never.
        lease: u64,
        /// The input that caused it.
        input: Option<MessageId>,
        /// The epoch under which the run was lost, if it is taken over.
        lost: Option<u64>,
    }
}

payload! {
    /// The run that the record names is over (spec RUN-6).
    RunEnd = RUN_END, {
        /// How it ended.
        status: Status,
        /// Why, for people.
        detail: Detail,
    }
}

payload! {
    /// Nothing was heard of who holds the run that the record names (spec RUN-5).
    RunLost = RUN_LOST, {
        /// The epoch that is not in force any more.
        epoch: u64,
    }
}

payload! {
    /// The run that the record names has read the inputs through a seq: what it says from here on knows them (spec RUN-8).
    RunConsumed = RUN_CONSUMED, {
        /// The last seq read.
        through: u64,
    }
}

words! {
    /// How many runs of a session may be active (spec RUN-2).
    RunMode, "run mode", {
        /// One at a time.
        Single = 0, "single";
        /// As many as the limit allows.
        Parallel = 1, "parallel";
        /// As many, and without leases: they are not lost, and whoever may append may write to them.
        Open = 2, "open";
    }
}

words! {
    /// What becomes of an input that comes while a run is active (spec RUN-9).
    InputPolicy, "input policy", {
        /// It waits behind those before it.
        Enqueue = 0, "enqueue";
        /// It is refused.
        Reject = 1, "reject";
        /// The run is told to stop for it.
        Interrupt = 2, "interrupt";
        /// It takes the place of those that wait.
        Latest = 3, "latest";
    }
}
