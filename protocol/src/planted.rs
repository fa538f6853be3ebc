//! Mistakes that are made on purpose, to see that the campaigns find them (see `sim/PLANTED.md`).
//!
//! They are compiled in with the feature `planted`, which no release has, and one of them is made once `plant` said which. Without the
//! feature [`planted`] is `false` when the code is compiled: none is ever made.

macro_rules! bugs {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// A mistake.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Bug {
            $($(#[$doc])* $name,)*
        }

        impl Bug {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its name.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

bugs! {
    /// A store answers an append before it is synced.
    AckBeforeSync = "ack-before-sync",
    /// A server answers, and shows, what it has given to the store and heard nothing of.
    ShownBeforeDurable = "shown-before-durable",
    /// A refusal tells of what is accepted and may never be durable.
    DirtyRefusal = "dirty-refusal",
    /// A server that loads a session has forgotten the last batches of its producers.
    DedupForgotten = "dedup-forgotten",
    /// A batch of an older epoch is accepted.
    LateFence = "late-fence",
    /// An epoch is granted before it is durable.
    EpochInMemory = "epoch-in-memory",
    /// Of a batch of more than two records the last one is not stored.
    HalfBatch = "half-batch",
    /// A departure names no generation, and takes any away.
    LeaveWithoutGeneration = "leave-without-generation",
    /// What was accepted and not committed goes on to be looked at by the rules.
    OverlayKept = "overlay-kept",
    /// Whoever begins in the middle of a chunk misses its first record.
    CatchUpOffByOne = "catch-up-off-by-one",
    /// Whoever has caught up with what is stored misses the first record that comes from memory.
    LiveOffByOne = "live-off-by-one",
    /// Whoever goes on at a seq misses the record there.
    ResumeOffByOne = "resume-off-by-one",
    /// What was trimmed is left out in silence.
    SwallowedGap = "swallowed-gap",
    /// A prefix matches whatever begins with its letters.
    PrefixWithoutBorder = "prefix-without-border",
    /// A filter of kinds lets every kind through.
    KindsIgnored = "kinds-ignored",
    /// The fold of a view keeps what was deleted.
    DeletionNotFolded = "deletion-not-folded",
    /// A subscription's tail is told as the seq that it begins at.
    CaughtUpTooEarly = "caught-up-too-early",
    /// A run that was lost is still held for who appends.
    RunNeverFenced = "run-never-fenced",
    /// A run is taken over from somebody who holds it.
    TakenFromHolder = "taken-from-holder",
    /// An increment looks at what is durable alone.
    IncrementOverDurable = "increment-over-durable",
    /// The condition of a change is not looked at.
    ConditionIgnored = "condition-ignored",
    /// A commit of which nothing is known counts as not committed.
    UnknownIsLost = "unknown-is-lost",
    /// A commit of which nothing is known counts as committed.
    UnknownIsStored = "unknown-is-stored",
    /// Leases are measured by a clock that jumps.
    LeaseOnWallClock = "lease-on-wall-clock",
    /// A server that loads a session waits for nobody who was a member.
    MembersForgotten = "members-forgotten",
    /// Tokens of every namespace are good for the first one.
    NamespaceIgnored = "namespace-ignored",
    /// A token that is revoked stays in force on connections that are there.
    RevocationLate = "revocation-late",
    /// A client that connects again takes what it had sent for stored.
    TakenForStored = "taken-for-stored",
    /// A client that connects again sends what was not acknowledged under new sequences.
    SentUnderNewSequence = "sent-under-new-sequence",
    /// A client that connects again does not send what it had sent.
    NeverSentAgain = "never-sent-again",
    /// A client says that a batch is not stored of which it does not know.
    UnknownToldAsFailed = "unknown-told-as-failed",
    /// Parts are put together without the first.
    CompactionLosesPart = "compaction-loses-part",
    /// A session is trimmed one chunk too far.
    TrimTooFar = "trim-too-far",
    /// Another life of a session goes on where the one before was.
    IncarnationIgnored = "incarnation-ignored",
    /// A subscription that has caught up is not woken any more by what comes.
    NeverWoken = "never-woken",
    /// Of several kinds that a filter names it lets the first one through.
    FirstKindAlone = "first-kind-alone",
    /// The position that a producer is told is that behind its next batch.
    PositionTooFar = "position-too-far",
    /// A member is lost after a tenth of its grace.
    GraceTooShort = "grace-too-short",
    /// A run that is over can be begun again.
    BegunAgain = "begun-again",
    /// A prefix does not match the session of its name.
    PrefixWithoutName = "prefix-without-name",
    /// A client that was given anything takes itself to have caught up.
    CaughtUpWithAnything = "caught-up-with-anything",
    /// Of what waits in a client the newest is sent first.
    NewestFirst = "newest-first",
    /// The fold of a view keeps members that were lost.
    DepartureNotFolded = "departure-not-folded",
    /// The hash of a value is kept where a key changes.
    DigestKept = "digest-kept",
    /// A session's time is that of a clock that jumps.
    TimeRunsBackwards = "time-runs-backwards",
    /// A client hands out twice what comes first on another connection.
    DeliveredTwice = "delivered-twice",
    /// Whoever may signal about what is his own may do so about whatever there is.
    OthersSignalled = "others-signalled",
    /// Whoever may signal about what is his own may not do so about a run that he holds.
    OwnRefused = "own-refused",
    /// A name includes whatever begins with its letters.
    SubjectWithoutBorder = "subject-without-border",
    /// A store that comes back is not held to what its witness says.
    WitnessIgnored = "witness-ignored",
    /// The witness is told of a commit before that is synced.
    WitnessBeforeSync = "witness-before-sync",
    /// A sync that failed counts as done.
    SyncErrorIgnored = "sync-error-ignored",
}

impl core::str::FromStr for Bug {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|bug| bug.name() == name);
        found.copied().ok_or_else(|| format!("there is no planted bug {name}"))
    }
}

#[cfg(feature = "planted")]
static PLANTED: core::sync::atomic::AtomicU8 = core::sync::atomic::AtomicU8::new(u8::MAX);

/// Makes this mistake from now on in the whole process, or none.
#[cfg(feature = "planted")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.store(bug.map_or(u8::MAX, |bug| bug as u8), core::sync::atomic::Ordering::Relaxed);
}

/// True if this mistake is to be made.
#[cfg(feature = "planted")]
pub fn planted(bug: Bug) -> bool {
    PLANTED.load(core::sync::atomic::Ordering::Relaxed) == bug as u8
}

/// True if this mistake is to be made.
#[cfg(not(feature = "planted"))]
pub const fn planted(_: Bug) -> bool {
    false
}
