//! What was accepted and is not durable yet: what it makes room for, what it stands in the way of, and what becomes of who asks again.

use std::sync::Arc;

use bytes::Bytes;
use mainstay_protocol::Code;
use mainstay_protocol::registry::{
    KEPT_LOST_RUNS, MAX_LEASE, MAX_MEMBER_DATA, MAX_OPEN_BYTES, MAX_RECORD, MAX_REQUESTS, MAX_SIGNALS, MIN_LEASE,
    PRODUCER_WINDOW,
};
use mainstay_protocol::session::{
    Activity, Author, Authority, Bounds, Change, ClientKey, Expected, InputPolicy, Intent, Key, Leases, MessageAppend,
    MessageEnd, MessageId, MessageStart, Outcome, Payload, PresenceJoined, PresenceUpdated, ProducerKey, Record,
    Refusal, Reply, RequestId, RequestOpened, Resolution, ResumeClaim, RunId, RunMode, SessionConfigured, SignalId,
    SignalResolved, State, StateChange, Status, Step, Target,
};
use mainstay_protocol::wire::{Detail, MAX_VARINT};

use crate::session::{LIFE, Session, alice, batch, bob, commit, label};

fn refused(outcome: Outcome) -> Result<(), Code> {
    match outcome {
        Outcome::Refused(refusal) => Err(refusal.code),
        _ => Ok(()),
    }
}

fn code(result: Result<(), Refusal>) -> Result<(), Code> {
    result.map_err(|refusal| refusal.code)
}

fn says(len: usize) -> Activity {
    Activity { status: label("idle"), progress: None, data: vec![b'd'; len].into() }
}

fn joined(name: &str, grace: u64) -> PresenceJoined {
    PresenceJoined { name: label(name), grace, activity: says(0) }
}

fn message(id: u8, record: Record) -> Record {
    Record { message: Some(MessageId([id; 16])), ..record }
}

fn begun(id: u8, role: &str) -> Record {
    message(id, MessageStart { role: label(role), content_type: label("text/plain") }.record(0))
}

fn ended(id: u8) -> Record {
    message(id, MessageEnd { status: Status::Complete, detail: Detail::default() }.record(0))
}

fn put(key: &str, value: usize, lasts: u64) -> Record {
    let change = Change::Put { value: vec![b'v'; value].into(), lasts };
    StateChange { key: Key::new(key).expect("a key"), expected: Expected::Any, change }.record(0)
}

fn request(id: u8, lasts: u64) -> RequestOpened {
    RequestOpened { request: RequestId([id; 16]), needs: label("approval"), lasts, body: "?".into() }
}

/// Spec PRES-3, LIM-4: who leaves makes room at once.
#[test]
fn a_member_that_leaves_makes_room_before_that_is_durable() {
    let bounds = Bounds { members: 1, ..Bounds::default() };
    let mut authority = Authority::new(State::new(LIFE), 1, None).bounded(bounds);
    let join =
        |authority: &mut Authority<()>, who: &Arc<Author>| refused(authority.join(1, who, joined("x", 5000), ()).0);
    assert_eq!(join(&mut authority, &alice()), Ok(()));
    commit(&mut authority);
    assert_eq!(join(&mut authority, &bob()), Err(Code::QUOTA_EXCEEDED));
    assert_eq!(authority.leave(1, &alice(), ()).0, Outcome::Pending);
    assert_eq!(join(&mut authority, &bob()), Ok(()));
    assert_eq!(join(&mut authority, &alice()), Err(Code::QUOTA_EXCEEDED));
    commit(&mut authority);
    assert_eq!(authority.state().view().members().len(), 1);
}

/// Spec SIG-5, SIG-8: what expired makes room at once.
#[test]
fn what_expired_makes_room_before_that_is_durable() {
    let mut session = Session::new();
    session.authority.start_run(1, &alice(), RunId([3; 16]), (5000, None), ());
    session.commit();
    let send = |session: &mut Session, id: u8, lasts: u64| {
        let signal = (SignalId([id; 16]), Intent::Interrupt, Some(Target::Run(RunId([3; 16]))));
        refused(session.authority.signal(1, (&alice(), true), signal, (lasts, Bytes::new()), ()).0)
    };
    for id in 1..=MAX_SIGNALS as u8 {
        assert_eq!(send(&mut session, id, if id == 1 { 10 } else { 1000 }), Ok(()), "{id}");
        session.commit();
    }
    assert_eq!(send(&mut session, 200, 1000), Err(Code::LIMIT_EXCEEDED));
    session.authority.tick(20);
    assert_eq!(send(&mut session, 200, 1000), Ok(()));
    assert_eq!(send(&mut session, 201, 1000), Err(Code::LIMIT_EXCEEDED));
    session.commit();

    for id in 1..=MAX_REQUESTS as u8 {
        let opened = session.append(20, request(id, if id == 1 { 10 } else { 500 }).record(0));
        assert_eq!(code(opened), Ok(()), "{id}");
    }
    let open = |session: &mut Session, id: u8| code(session.accept(40, None, &[request(id, 500).record(0)]));
    assert_eq!(open(&mut session, 200), Err(Code::LIMIT_EXCEEDED));
    session.authority.tick(40);
    assert_eq!(open(&mut session, 200), Ok(()));
    assert_eq!(open(&mut session, 201), Err(Code::LIMIT_EXCEEDED));
}

/// Spec MSG-5: what is finished makes room at once, and no more than it had; exactly the limit is open.
#[test]
fn a_finished_message_makes_room_before_that_is_durable() {
    let mut session = Session::new();
    let part = |id: u8, len: usize| message(id, MessageAppend(vec![b't'; len].into()).record(0));
    let messages = (MAX_OPEN_BYTES / (2 * MAX_RECORD)) as u8;
    for id in 0..messages {
        session.append(1, begun(id, "assistant")).expect("stored");
        // Two records of the longest, but for their heads.
        for len in [MAX_RECORD - 64, MAX_RECORD - 64, 128] {
            session.append(1, part(id, len)).expect("stored");
        }
    }
    let view = session.view();
    assert_eq!(view.messages().open().iter().map(|message| message.text.len()).sum::<usize>(), MAX_OPEN_BYTES);
    let restored = State::restore(&session.authority.state().snapshot()).expect("as much as may be");
    assert_eq!(restored.snapshot(), session.authority.state().snapshot());
    session.append(1, begun(100, "assistant")).expect("stored");
    assert_eq!(code(session.accept(1, None, &[part(100, 1)])), Err(Code::LIMIT_EXCEEDED));
    assert_eq!(code(session.accept(1, None, &[ended(0)])), Ok(()));
    assert_eq!(code(session.accept(1, None, &[part(100, MAX_RECORD - 64), part(100, 1)])), Ok(()));
    assert_eq!(code(session.accept(1, None, &[part(100, MAX_RECORD - 64)])), Ok(()));
    assert_eq!(code(session.accept(1, None, &[part(100, 127)])), Ok(()));
    assert_eq!(code(session.accept(1, None, &[part(100, 1)])), Err(Code::LIMIT_EXCEEDED));
    // Nothing is added, and nothing is too much.
    assert_eq!(code(session.accept(1, None, &[part(100, 0)])), Ok(()));
    session.commit();
    let open = session.view().messages().open().iter().map(|message| message.text.len()).sum::<usize>();
    assert_eq!(open, MAX_OPEN_BYTES);
}

/// Spec LIM-4, STATE-2: where less is allowed than there is, it may be changed, and not become more.
#[test]
fn what_is_more_than_is_allowed_now_may_be_changed_and_not_grow() {
    let mut session = Session::new();
    for key in ["a", "b", "c"] {
        session.append(1, put(key, 10, 0)).expect("stored");
    }
    let bounds = Bounds { state_keys: 2, state_bytes: 20, ..Bounds::default() };
    let state = State::restore(&session.authority.state().snapshot()).expect("a snapshot");
    session.authority = Authority::new(state, 2, None).bounded(bounds);
    let key = ProducerKey { subject: alice().subject.clone(), name: label("p") };
    session.handle = session.authority.state().producers().find(&key).expect("granted");
    assert_eq!(code(session.accept(1, None, &[put("a", 10, 0)])), Ok(()), "as long as it was");
    assert_eq!(code(session.accept(1, None, &[put("a", 9, 0)])), Ok(()));
    let grown = session.accept(1, None, &[put("a", 10, 0)]).expect_err("too long");
    assert_eq!((grown.code, grown.value), (Code::QUOTA_EXCEEDED, 20));
    let more = session.accept(1, None, &[put("d", 0, 0)]).expect_err("too many");
    assert_eq!((more.code, more.value), (Code::QUOTA_EXCEEDED, 2));
}

/// Spec PRES-2: what a member says of itself is bounded, whether something waits in front of it or not.
#[test]
fn what_a_member_says_is_bounded() {
    let mut session = Session::new();
    let join = |session: &mut Session, len: usize| {
        let joined = PresenceJoined { activity: says(len), ..joined("x", 5000) };
        refused(session.authority.join(1, &alice(), joined, ()).0)
    };
    assert_eq!(join(&mut session, MAX_MEMBER_DATA + 1), Err(Code::LIMIT_EXCEEDED));
    assert_eq!(join(&mut session, MAX_MEMBER_DATA), Ok(()));
    session.commit();
    let update = |session: &mut Session, len: usize| {
        code(session.authority.update(1, &alice(), PresenceUpdated { activity: says(len) }))
    };
    assert_eq!(update(&mut session, MAX_MEMBER_DATA + 1), Err(Code::LIMIT_EXCEEDED));
    assert_eq!(update(&mut session, 5), Ok(()));
    assert_eq!(update(&mut session, MAX_MEMBER_DATA + 1), Err(Code::LIMIT_EXCEEDED), "one waits already");
    session.commit();
    assert_eq!(session.view().members().get(&alice()).expect("here").activity.data.len(), 5);
}

/// Spec PRES-1: who comes back under another name, or for another time, is another member.
#[test]
fn a_member_with_another_name_or_grace_joins_anew() {
    let mut session = Session::new();
    let mut generations = Vec::new();
    for (name, grace) in [("phone", 5000), ("tablet", 5000), ("tablet", 6000), ("tablet", 6000)] {
        session.authority.join(1, &alice(), joined(name, grace), ());
        session.commit();
        let member = session.view().members().get(&alice()).expect("here");
        assert_eq!((member.name.as_str(), member.grace), (name, grace));
        generations.push(member.generation);
    }
    assert!(generations[0] < generations[1] && generations[1] < generations[2], "{generations:?}");
    assert_eq!(generations[2], generations[3], "the same again");
}

/// Spec RES-4: the same claim may come again at any time, and a claim that did not become durable binds nobody.
#[test]
fn a_claim_that_comes_again_is_answered_as_before() {
    let mut authority = Authority::<u8>::new(State::new(LIFE), 1, None);
    let (key, other) = (ClientKey([7; 32]), ClientKey([8; 32]));
    let claim = |generation| ResumeClaim { key, generation };
    let resume = |authority: &mut Authority<u8>, claim: ResumeClaim| match authority.resume(1, &alice(), &claim, 0).0 {
        Outcome::Done(Reply::Resumed { generation, .. }) => Ok(Some(generation)),
        Outcome::Refused(refusal) => Err(refusal.code),
        _ => Ok(None),
    };
    let stored = |authority: &mut Authority<u8>| -> Vec<u64> {
        let mut generations = Vec::new();
        while let Step::Commit(_) = authority.next_chunk() {
            for (_, reply) in authority.committed().expect("follows").expect("a chunk").replies {
                match reply {
                    Reply::Resumed { generation, .. } => generations.push(generation),
                    reply => panic!("{reply:?}"),
                }
            }
        }
        generations
    };
    // A first claim that is not stored binds nobody.
    assert_eq!(resume(&mut authority, ResumeClaim::first(other)), Ok(None));
    assert!(matches!(authority.next_chunk(), Step::Commit(_)));
    assert_eq!(authority.not_committed(), [0]);
    assert_eq!(resume(&mut authority, ResumeClaim::first(key)), Ok(None));
    assert_eq!(resume(&mut authority, ResumeClaim::first(key)), Ok(None), "it is being stored");
    assert_eq!(resume(&mut authority, ResumeClaim::first(other)), Err(Code::RESUME_REQUIRED));
    assert_eq!(stored(&mut authority), [0, 0]);
    assert_eq!(resume(&mut authority, ResumeClaim::first(key)), Ok(Some(0)), "its answer was lost");
    assert_eq!(resume(&mut authority, claim(Some(0))), Ok(None));
    assert_eq!(resume(&mut authority, claim(Some(0))), Ok(None), "it is being stored");
    assert_eq!(stored(&mut authority), [1, 1]);
    assert_eq!(resume(&mut authority, claim(Some(0))), Ok(Some(1)), "its answer was lost");
    assert_eq!(resume(&mut authority, claim(Some(2))), Err(Code::RESUME_INVALID));
    assert_eq!(resume(&mut authority, claim(Some(1))), Ok(None));
    assert_eq!(stored(&mut authority), [2]);
    assert_eq!(resume(&mut authority, claim(Some(0))), Err(Code::RESUME_STALE));
}

/// Spec DUR-2: however many refusals waited for what they contradict, none is in the way once it was told.
#[test]
fn refusals_that_were_told_make_room_for_others() {
    let mut session = Session::new();
    // More than may wait at once, which is 1,024.
    for round in 0..1100u64 {
        session.accept(1, None, &[put("k", 1, 0)]).expect("accepted");
        let refusal = Refusal::new(Code::CONFLICT, "another revision");
        assert_eq!(session.authority.refuse(refusal, ()), None, "after {round} that were told");
        session.commit();
    }
}

/// Spec DUR-4, STATE-6: nothing is written for the clock while it is not known what is stored, nor when the session is closed.
#[test]
fn nothing_is_due_while_it_is_not_known_what_is_stored() {
    let mut session = Session::new();
    session.append(1, put("k", 1, 10)).expect("stored");
    session.accept(1, None, &[put("other", 1, 0)]).expect("accepted");
    assert!(matches!(session.authority.next_chunk(), Step::Commit(_)));
    session.authority.unknown();
    session.authority.tick(20);
    session.authority.committed().expect("follows");
    assert!(session.authority.is_idle(), "what is due is looked at again once it is known");
    session.authority.tick(20);
    assert!(!session.authority.is_idle());
    session.commit();
    session.append(20, put("k", 1, 10)).expect("stored");
    session.authority.close(20, &alice(), ());
    session.authority.tick(40);
    session.commit();
    assert!(session.view().closed().is_some());
    assert!(session.view().state().get("k").is_some(), "a closed session changes no more");
}

/// Spec RUN-4.
#[test]
fn a_lease_is_within_its_bounds() {
    let mut session = Session::new();
    for lease in [0, MIN_LEASE - 1, MAX_LEASE + 1, MAX_VARINT] {
        let begun = session.authority.start_run(1, &alice(), RunId([3; 16]), (lease, None), ()).0;
        assert_eq!(refused(begun), Err(Code::LIMIT_EXCEEDED), "{lease}");
        let taken = session.authority.take_run(&alice(), (None, lease, 0), ()).0;
        assert_eq!(refused(taken), Err(Code::LIMIT_EXCEEDED), "{lease}");
    }
    for lease in [MIN_LEASE, MAX_LEASE] {
        let mut session = Session::new();
        assert_eq!(session.authority.start_run(1, &alice(), RunId([3; 16]), (lease, None), ()).0, Outcome::Pending);
        assert!(session.authority.wake().is_some(), "somebody has to look when it ends");
    }
    // Where runs are open to all, nobody holds one, and nothing ends.
    let mut session = Session::new();
    let open = SessionConfigured { runs: RunMode::Open, inputs: InputPolicy::Enqueue };
    session.authority.configure(1, &alice(), open, ());
    session.commit();
    assert_eq!(session.authority.start_run(1, &alice(), RunId([3; 16]), (MIN_LEASE, None), ()).0, Outcome::Pending);
    assert_eq!(session.authority.wake(), None);
}

/// Spec RUN-7: who took a run over and did not hear of it asks again, and is told; who began one has taken nothing over.
#[test]
fn who_took_a_run_over_is_told_so_again() {
    let mut session = Session::new();
    let configured = SessionConfigured { runs: RunMode::Parallel, inputs: InputPolicy::Enqueue };
    session.authority.configure(1, &alice(), configured, ());
    let (lost, other) = (RunId([3; 16]), RunId([4; 16]));
    session.authority.start_run(1, &alice(), lost, (5000, None), ());
    session.authority.start_run(1, &bob(), other, (5000, None), ());
    session.commit();
    let began = session.view().runs().get(lost).expect("begun").epoch;
    session.authority.lose_run(2, lost, began);
    session.commit();
    let ask = |session: &mut Session, who: &Arc<Author>, run, since| {
        session.authority.take_run(who, (run, 5000, since), ()).0
    };
    assert_eq!(ask(&mut session, &bob(), Some(lost), MAX_VARINT), Outcome::Pending);
    assert!(session.authority.follow_up(3).is_empty());
    let held = |session: &Session, who: &Arc<Author>, epoch| session.authority.held_run(who, epoch).is_ok();
    assert!(!held(&session, &bob(), began) && !held(&session, &alice(), began), "it is held under another epoch");
    session.commit();
    let epoch = session.view().runs().get(lost).expect("taken over").epoch;
    assert!(epoch > began && held(&session, &bob(), epoch) && !held(&session, &bob(), began));
    let told = Outcome::Done(Reply::Run { run: lost, epoch, lost: Some(began) });
    assert_eq!(ask(&mut session, &bob(), Some(lost), epoch), told);
    assert_eq!(ask(&mut session, &bob(), None, 0), told, "the one that bob began was not lost");
    assert_eq!(ask(&mut session, &bob(), Some(lost), epoch + 1), Outcome::Pending, "that is known");
    assert_eq!(ask(&mut session, &bob(), Some(other), 0), Outcome::Pending, "it is another one");
    assert_eq!(ask(&mut session, &alice(), Some(lost), 0), Outcome::Pending, "bob has it");
}

/// Spec RUN-5: of runs that are lost and that nobody took over the last are kept, also before that is durable.
#[test]
fn the_oldest_of_too_many_lost_runs_is_over_before_that_is_durable() {
    let mut session = Session::new();
    let configured = SessionConfigured { runs: RunMode::Parallel, inputs: InputPolicy::Enqueue };
    session.authority.configure(1, &alice(), configured, ());
    let run = |at: usize| RunId([at as u8; 16]);
    for at in 0..=KEPT_LOST_RUNS {
        session.authority.start_run(1, &alice(), run(at), (5000, None), ());
        session.commit();
    }
    let lose = |session: &mut Session, at: usize| {
        let epoch = session.view().runs().get(run(at)).expect("begun").epoch;
        session.authority.lose_run(2, run(at), epoch);
    };
    let begin =
        |session: &mut Session, at: usize| refused(session.authority.start_run(2, &bob(), run(at), (5000, None), ()).0);
    (0..KEPT_LOST_RUNS).for_each(|at| lose(&mut session, at));
    assert_eq!(begin(&mut session, 0), Err(Code::UNAVAILABLE), "its loss is not durable yet");
    lose(&mut session, KEPT_LOST_RUNS);
    assert_eq!(begin(&mut session, 0), Err(Code::RUN_OVER));
    assert_eq!(begin(&mut session, 1), Err(Code::UNAVAILABLE));
    session.commit();
    assert!(session.view().runs().get(run(0)).is_none());
    assert_eq!(session.view().runs().current().len(), KEPT_LOST_RUNS);
    assert_eq!(begin(&mut session, 1), Ok(()), "it is taken over");
}

/// Spec SIG-2, SIG-4: what was for an input is for the run that it causes, also before that is durable: nobody but who holds it says what became of it.
#[test]
fn what_was_for_an_input_belongs_to_its_run_at_once() {
    let mut session = Session::new();
    let input = MessageId([0x77; 16]);
    session.append(1, begun(0x77, "user")).expect("stored");
    session.append(1, ended(0x77)).expect("stored");
    let signal = (SignalId([9; 16]), Intent::Steer, Some(Target::Input(input)));
    session.authority.signal(1, (&alice(), true), signal, (1000, Bytes::new()), ());
    session.commit();
    session.authority.start_run(1, &bob(), RunId([3; 16]), (5000, Some(input)), ());
    let outcome = Resolution::Consumed;
    let resolved = SignalResolved { signal: SignalId([9; 16]), outcome, detail: Detail::default() };
    assert_eq!(code(session.accept(1, None, &[resolved.record(0)])), Err(Code::RUN_FENCED));
    session.commit();
    assert_eq!(session.view().signals().pending().first().expect("it waits").run, Some(RunId([3; 16])));
}

/// Spec SIG-9: a request that named a run before it was begun is not that run's.
#[test]
fn a_request_that_was_there_before_its_run_is_not_its_holders() {
    let mut session = Session::new();
    let run = RunId([3; 16]);
    let key = ProducerKey { subject: bob().subject.clone(), name: label("p") };
    session.authority.open_producer(1, key.clone(), None, ());
    session.commit();
    let handle = session.authority.state().producers().find(&key).expect("granted");
    let before = Record { run: Some(run), ..request(1, 1000).record(0) };
    session.authority.append(1, &bob(), (&handle, 1, 0), None, batch(&[before]), ());
    session.commit();
    let epoch = session.begin(run);
    let after = Record { run: Some(run), ..request(2, 1000).record(0) };
    session.accept(1, Some(epoch), &[after]).expect("accepted");
    session.commit();
    let answer = |session: &mut Session, id: u8| {
        let signal = (SignalId([id; 16]), Intent::Approve, Some(Target::Request(RequestId([id; 16]))));
        refused(session.authority.signal(2, (&alice(), false), signal, (0, Bytes::new()), ()).0)
    };
    assert_eq!(answer(&mut session, 1), Err(Code::FORBIDDEN));
    assert_eq!(answer(&mut session, 2), Ok(()));
}

/// Spec PROD-4, PROD-6: why a batch may not come, in words that tell the cases of one code apart.
#[test]
fn a_batch_that_may_not_come_is_told_why() {
    let mut session = Session::new();
    let key = ProducerKey { subject: alice().subject.clone(), name: label("p") };
    let append = |session: &mut Session, epoch: u64, sequence: u64| {
        let of = batch(&[Record::data(0, "x")]);
        match session.authority.append(1, &alice(), (&session.handle, epoch, sequence), None, of, ()).0 {
            Outcome::Refused(refusal) => Err((refusal.code, refusal.value, refusal.detail)),
            _ => Ok(()),
        }
    };
    let window = PRODUCER_WINDOW as u64;
    assert_eq!(append(&mut session, 2, 0).map_err(|of| of.0), Err(Code::PRODUCER_UNKNOWN));
    let ahead = append(&mut session, 1, 1);
    assert_eq!(ahead, Err((Code::SEQ_GAP, 0, "the batch is ahead of the producer's next sequence")));
    for sequence in 0..window {
        assert_eq!(append(&mut session, 1, sequence), Ok(()));
    }
    assert_eq!(append(&mut session, 1, window), Err((Code::LIMIT_EXCEEDED, 0, "too many batches are unacknowledged")));
    session.commit();
    assert_eq!(append(&mut session, 1, window), Ok(()));
    session.commit();
    let old = append(&mut session, 1, 0);
    assert_eq!(old, Err((Code::DUPLICATE, window + 1, "the batch was stored long ago")));
    // Whoever opened it before is not the one that has it.
    let before = session.handle.clone();
    session.authority.open_producer(1, key.clone(), Some(1), ());
    let again = append(&mut session, 1, window + 1);
    assert_eq!(again, Err((Code::FENCED, 1, "the producer was opened again under its epoch")));
    session.authority.open_producer(1, key, None, ());
    session.commit();
    session.handle = before;
    let newer = append(&mut session, 1, window + 1);
    assert_eq!(newer, Err((Code::FENCED, 2, "a newer epoch of this producer was granted")));
}

/// Spec PROD-4: of what was never granted nothing newer can have been.
#[test]
fn an_epoch_that_was_never_granted_is_not_fenced() {
    let mut authority = Authority::<()>::new(State::new(LIFE), 1, None);
    let key = ProducerKey { subject: alice().subject.clone(), name: label("p") };
    for epoch in [0, 1, 7] {
        assert_eq!(refused(authority.open_producer(1, key.clone(), Some(epoch), ()).0), Err(Code::PRODUCER_UNKNOWN));
    }
}

/// Spec RUN-4: what was heard in the moment in which the holder of a run went is no sign that he came back.
#[test]
fn a_lease_that_was_hastened_lasts_with_what_is_heard_later() {
    for (heard, lapses) in [(99, true), (100, true), (101, false)] {
        let mut leases = Leases::default();
        leases.follow(0, [("run", 1, 1000)].into_iter());
        leases.hasten(&"run", 1, (100, 200));
        let lapsed = leases.lapsed(200, |_, _| Some(heard));
        assert_eq!(lapsed.len(), usize::from(lapses), "heard at {heard}");
    }
    // What was heard a whole lease ago was heard too long ago.
    for (heard, lapses) in [(0, true), (1, false)] {
        let mut leases = Leases::default();
        leases.follow(0, [("run", 1, 1000)].into_iter());
        let lapsed = leases.lapsed(1000, |_, _| Some(heard));
        assert_eq!(lapsed.len(), usize::from(lapses), "heard at {heard}");
    }
}

/// Spec RUN-5: a run is lost under the epoch under which it is held.
#[test]
fn a_run_is_lost_under_its_own_epoch_alone() {
    let mut session = Session::new();
    let run = RunId([3; 16]);
    let epoch = session.begin(run);
    for other in [epoch + 1, MAX_VARINT] {
        session.authority.lose_run(2, run, other);
        session.commit();
        assert!(session.view().runs().get(run).expect("begun").lost.is_none(), "under {other}");
    }
    session.authority.lose_run(2, run, epoch);
    session.commit();
    assert!(session.view().runs().get(run).expect("begun").lost.is_some());
}

/// Spec PRES-2: of what a member says one after the other the last is stored, also where it says something else in between.
#[test]
fn an_update_takes_the_place_of_one_that_waits_in_front_of_data() {
    let mut session = Session::new();
    session.authority.join(1, &alice(), joined("x", 5000), ());
    session.commit();
    let update = |session: &mut Session, len: usize| {
        session.authority.update(1, &alice(), PresenceUpdated { activity: says(len) }).expect("a member");
    };
    let before = session.authority.state().tail();
    update(&mut session, 1);
    session.accept(1, None, &[Record::data(0, "x")]).expect("accepted");
    update(&mut session, 2);
    session.commit();
    assert_eq!(session.authority.state().tail() - before, 2, "one update, and the data");
    assert_eq!(session.view().members().get(&alice()).expect("here").activity.data.len(), 2);
}
