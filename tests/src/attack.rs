//! A client that wants to do harm: one way of doing so for each connection, until it is told to stop.
//!
//! Everything goes to the server that it is pointed at, and is bounded: by the number of connections, by the time, and by pauses, so that an
//! attack is not one on the machine that runs it.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use mainstay_protocol::registry::{ALPN, MAX_FRAME};
use mainstay_protocol::session::{
    Activity, Change, Expected, Intent, Key, MessageId, Payload, Record, SignalId, StateChange, Target,
};
use mainstay_protocol::wire::{
    Append, Attach, AttachMode, Frame, Join, List, Mint, OpenProducer, Ping, Produce, Signal, Start, Subscribe, Token,
    Update, Writer,
};
use mainstay_transport::quic::{GatheringRuntime, QuicConnector, Sockets, Trust, bind};
use mainstay_transport::sim::Random;
use mainstay_transport::{
    Connection, ConnectionError, Connector, FrameError, FrameReader, RecvStream, SendStream, StreamError,
};
use quinn::{AsyncUdpSocket, Runtime};
use tokio::net::UdpSocket;
use tokio::time::{sleep, timeout};

use crate::raw::{Raw, Recv, Send, append, attach, hello, subscribe};

/// What to attack, and with what.
#[derive(Debug, Clone)]
pub struct Aim {
    /// The server.
    pub addr: SocketAddr,
    /// How it is known.
    pub trust: Trust,
    /// Tokens that are genuine and allow everything on sessions under `prefix`: whoever attacks may be a customer.
    pub tokens: Vec<String>,
    /// Where those tokens allow something.
    pub prefix: String,
}

macro_rules! ways {
    ($( $(#[$doc:meta])* $name:ident $word:literal, )+) => {
        /// A way of attacking.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Way { $( $(#[$doc])* $name, )+ }

        impl Way {
            /// All of them.
            pub const ALL: &'static [Self] = &[$( Self::$name, )+];

            /// Its name.
            pub const fn as_str(self) -> &'static str {
                match self { $( Self::$name => $word, )+ }
            }
        }

        impl core::str::FromStr for Way {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                Self::ALL.iter().copied().find(|way| way.as_str() == text).ok_or_else(|| {
                    let known: Vec<_> = Self::ALL.iter().map(|way| way.as_str()).collect();
                    format!("no way of attacking; they are {}", known.join(", "))
                })
            }
        }
    };
}

ways! {
    /// Handshakes that are begun and never ended.
    SlowHandshake "slow-handshake",
    /// Datagrams that are no QUIC, of no version, or of no connection.
    Garbage "garbage",
    /// HELLO one byte at a time.
    SlowHello "slow-hello",
    /// A frame that is announced as long as may be, and dripped.
    SlowFrame "slow-frame",
    /// As many QUIC streams as are allowed, each with a byte.
    Streams "streams",
    /// QUIC streams that are opened and reset at once.
    Resets "resets",
    /// Subscriptions that are never read.
    NeverReads "never-reads",
    /// Lengths and counts that promise more than there is, at every depth.
    Lengths "lengths",
    /// Frames that are nearly right.
    Fuzz "fuzz",
    /// Tokens that are guessed.
    Tokens "tokens",
    /// A first flight, over and over.
    Replay "replay",
    /// Sessions without end.
    Sessions "sessions",
    /// Members that come, change and go.
    Members "members",
    /// Keys of state without end.
    State "state",
    /// Signals without end.
    Signals "signals",
    /// Lists and tokens, as fast as they are answered.
    Lookups "lookups",
    /// Batches, as fast as they are taken, whatever is refused.
    Appends "appends",
    /// Questions on control whose answers are never read.
    Pings "pings",
    /// Connections that come and go.
    Reconnects "reconnects",
}

/// The address of this machine that attackers of one network have; there are forty of them, and the honest ones are in none.
#[derive(Debug, Clone, Copy)]
struct Home(Ipv4Addr);

impl Home {
    fn of(random: &mut Random) -> Self {
        Self(Ipv4Addr::new(127, 1 + random.below(40) as u8, 0, 1))
    }

    async fn socket(self) -> io::Result<UdpSocket> {
        UdpSocket::bind((self.0, 0)).await
    }

    fn connector(self, addr: SocketAddr, trust: &Trust) -> Result<QuicConnector, String> {
        let limits = mainstay_client::Config::default().transport_limits();
        QuicConnector::over(Arc::new(self), Arc::new(GatheringRuntime), addr, trust, &limits, ALPN)
    }

    async fn connect(self, aim: &Aim, first: &[u8]) -> Option<Raw> {
        Raw::try_over(&self.connector(aim.addr, &aim.trust).ok()?, first).await.ok()
    }
}

impl Sockets for Home {
    fn bind(&self, _: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        GatheringRuntime.wrap_udp_socket(bind((self.0, 0).into())?)
    }

    fn route(&self, _: SocketAddr) -> Option<IpAddr> {
        Some(self.0.into())
    }
}

/// How often something was done, and how often the server put an end to it.
#[derive(Debug, Default)]
pub struct Tally {
    /// Blows that were struck.
    pub blows: AtomicU64,
    /// Connections that were made.
    pub connections: AtomicU64,
    /// Connections that were not made, or ended by the server.
    pub ended: AtomicU64,
    /// With which codes malformed input was answered, and how often.
    pub codes: Mutex<BTreeMap<u64, u64>>,
    /// Answers that are none of the protocol's.
    pub malformed: AtomicU64,
    /// Connections with early data that were overheard.
    pub early: AtomicU64,
}

impl Tally {
    fn count(&self, code: u64) {
        *self.codes.lock().unwrap_or_else(PoisonError::into_inner).entry(code).or_default() += 1;
    }

    /// What was answered, if it says that something is wrong.
    fn hear(&self, answer: &Result<Option<Frame>, FrameError>) {
        match answer {
            Ok(Some(Frame::Error(error))) => self.count(error.code.0),
            Ok(Some(Frame::Refused(refused))) => self.count(refused.code.0),
            Err(FrameError::Lost(StreamError::Reset(code) | StreamError::Stopped(code))) => self.count(*code),
            Err(FrameError::Lost(StreamError::Connection(ConnectionError::Closed { code, .. }))) => self.count(*code),
            Err(FrameError::Violation(_)) => drop(self.malformed.fetch_add(1, Ordering::Relaxed)),
            _ => {}
        }
    }

    fn blow(&self) {
        self.blows.fetch_add(1, Ordering::Relaxed);
    }
}

/// Attacks in one way over one connection at a time, until it is dropped.
pub async fn attack(way: Way, aim: Arc<Aim>, seed: u64, tally: Arc<Tally>) {
    let mut random = Random::new(seed);
    let home = Home::of(&mut random);
    loop {
        let lived = match way {
            Way::SlowHandshake => slow_handshake(home, &aim, &tally).await,
            Way::Garbage => garbage(home, &aim, &mut random, &tally).await,
            Way::Replay => replay(home, &aim, &mut random, &tally).await,
            _ => over_a_connection(way, home, &aim, &mut random, &tally).await,
        };
        if lived.is_none() {
            tally.ended.fetch_add(1, Ordering::Relaxed);
        }
        // Somebody who is thrown out comes again.
        sleep(Duration::from_millis(20 + random.below(180))).await;
    }
}

fn token<'a>(aim: &'a Aim, random: &mut Random) -> &'a str {
    &aim.tokens[random.below(aim.tokens.len() as u64) as usize]
}

fn instance(random: &mut Random) -> [u8; 16] {
    core::array::from_fn(|_| random.below(256) as u8)
}

fn session(aim: &Aim, random: &mut Random, of: u64) -> String {
    format!("{}/{}", aim.prefix, random.below(of))
}

/// `None` once the server ends it, as all that follow.
async fn over_a_connection(way: Way, home: Home, aim: &Aim, random: &mut Random, tally: &Tally) -> Option<()> {
    if way == Way::SlowHello {
        let whole = hello(token(aim, random).to_owned(), instance(random));
        let mut raw = home.connect(aim, &whole[..1]).await?;
        tally.connections.fetch_add(1, Ordering::Relaxed);
        for byte in whole.iter().skip(1) {
            raw.control.0.write(&mut [Bytes::copy_from_slice(&[*byte])]).await.ok()?;
            tally.blow();
            sleep(Duration::from_millis(400)).await;
        }
        return Some(());
    }
    let first = hello(token(aim, random).to_owned(), instance(random));
    let mut raw = home.connect(aim, &first).await?;
    tally.connections.fetch_add(1, Ordering::Relaxed);
    match way {
        Way::Reconnects => {
            tally.blow();
            raw.connection.close(random.below(1 << 20), "");
        }
        Way::Pings => loop {
            let ping = Frame::from(Ping { nonce: 1, padding: Some(vec![0; 200].into()) }).to_bytes();
            let mut many: Vec<Bytes> = (0..50).map(|_| ping.clone()).collect();
            timeout(STUCK, raw.control.0.write(&mut many)).await.ok()?.ok()?;
            tally.blow();
            sleep(PAUSE).await;
        },
        Way::Tokens => loop {
            let mut guess = token(aim, random).to_owned().into_bytes();
            let at = random.below(guess.len() as u64) as usize;
            guess[at] = b'A' + random.below(26) as u8;
            raw.control.0.write(&mut [Frame::from(Token { token: guess.into() }).to_bytes()]).await.ok()?;
            tally.blow();
            timeout(STUCK, raw.control.1.next()).await.ok()?.ok()??;
        },
        Way::Streams | Way::Resets => streams(way, &raw, tally).await?,
        Way::Lengths | Way::Fuzz => bad_frames(way, aim, &mut raw, random, tally).await?,
        Way::Lookups => loop {
            let list = Frame::from(List { prefix: Bytes::new(), after: Bytes::new(), limit: 256 });
            let grants = mainstay_protocol::session::Grants::default();
            let mint = Frame::from(Mint { name: "x".parse().ok()?, lasts: 1, device: None, grants });
            let (_send, mut frames) = raw.try_open(&[list, mint][random.below(2) as usize].to_bytes()).await?;
            let _ = timeout(STUCK, frames.next()).await;
            tally.blow();
        },
        Way::Sessions => loop {
            let name = session(aim, random, u64::MAX >> 8);
            let (mut send, mut frames) = raw.try_open(&attach(&name)).await?;
            let _ = timeout(STUCK, frames.next()).await;
            send.finish();
            tally.blow();
        },
        _ => attached(way, aim, &raw, random, tally).await?,
    }
    Some(())
}

/// How long an attacker waits for a server that does not take any more.
const STUCK: Duration = Duration::from_secs(5);
/// Between two blows of those that cost nothing.
const PAUSE: Duration = Duration::from_millis(2);

async fn streams(way: Way, raw: &Raw, tally: &Tally) -> Option<()> {
    let mut held = Vec::new();
    loop {
        let opened = timeout(Duration::from_millis(200), raw.connection.open_bi()).await;
        match opened {
            Ok(stream) => {
                let (mut send, mut recv) = stream.ok()?;
                let _ = send.write(&mut [Bytes::from_static(&[0x10])]).await;
                if way == Way::Resets {
                    send.reset(7);
                    recv.stop(7);
                } else {
                    held.push((send, recv));
                }
            }
            // As many as are allowed are open: they are given up together.
            Err(_) => held.clear(),
        }
        if let Ok(stream) = timeout(Duration::from_millis(1), raw.connection.open_uni()).await {
            stream.ok()?.reset(1);
        }
        tally.blow();
    }
}

/// Lengths that promise more than there can be.
const HUGE: [&[u8]; 4] = [&[0x7f, 0xff], &[0xbf, 0xff, 0xff, 0xff], &[0xff; 8], &[0x40, 0x00]];

fn some<'a, T: ?Sized>(all: &'a [impl AsRef<T>], random: &mut Random) -> &'a T {
    all[random.below(all.len() as u64) as usize].as_ref()
}

/// What frames and records look like, right ones and wrong ones: those that the specification shows.
struct Shown {
    frames: Vec<Vec<u8>>,
    records: Vec<Vec<u8>>,
}

fn shown() -> &'static Shown {
    static SHOWN: std::sync::OnceLock<Shown> = std::sync::OnceLock::new();
    fn bytes(text: &str) -> Vec<Vec<u8>> {
        let shown = text.lines().filter_map(|line| line.strip_prefix("hex = \"")?.strip_suffix('"'));
        let byte = |hex: &[u8]| u8::from_str_radix(std::str::from_utf8(hex).expect("text"), 16).expect("hex");
        let whole = shown.map(|hex| hex.as_bytes().chunks(2).map(byte).collect::<Vec<_>>());
        whole.filter(|whole| !whole.is_empty()).collect()
    }
    SHOWN.get_or_init(|| Shown {
        frames: bytes(include_str!("../../spec/vectors/frames.toml")),
        records: bytes(include_str!("../../spec/vectors/records.toml")),
    })
}

/// Frames whose lengths and counts promise what is not there: in front, or anywhere in what the frame is made of.
fn promising(random: &mut Random) -> Vec<u8> {
    let huge = some::<[u8]>(&HUGE, random);
    let kinds = [0x10u64, 0x14, 0x18, 0x22, 0x3e, 0x40, 0x44, 0x5c, 0x64, 0x66, 0x70, 0x74];
    let mut frame = Writer::new();
    match random.below(3) {
        0 => {
            frame.varint(kinds[random.below(kinds.len() as u64) as usize]);
            frame.raw(huge);
        }
        1 => {
            frame.varint(kinds[random.below(kinds.len() as u64) as usize]);
            let mut body = vec![random.below(4) as u8; random.below(4) as usize];
            body.extend_from_slice(huge);
            body.extend((0..random.below(40)).map(|_| random.below(256) as u8));
            frame.bytes(&body);
        }
        _ => {
            // Type and length are a byte each in all but a few of them.
            let mut body = some::<[u8]>(&shown().frames, random).to_vec();
            let kind = u64::from(body.remove(0));
            body.drain(..1.min(body.len()));
            overwrite(&mut body, huge, random);
            frame.varint(kind);
            frame.bytes(&body);
        }
    }
    frame.freeze().to_vec()
}

/// Puts bytes in the place of others, anywhere.
fn overwrite(bytes: &mut Vec<u8>, with: &[u8], random: &mut Random) {
    let at = random.below(bytes.len() as u64 + 1) as usize;
    let end = (at + with.len()).min(bytes.len());
    bytes.splice(at..end, with.iter().copied());
}

/// A batch whose records are nearly right, or promise what is not there.
fn bad_batch(way: Way, sequence: u64, random: &mut Random) -> Vec<u8> {
    let count = 1 + random.below(3);
    let mut records: Vec<u8> = (0..count).flat_map(|_| some::<[u8]>(&shown().records, random).to_vec()).collect();
    match way {
        Way::Lengths => overwrite(&mut records, some::<[u8]>(&HUGE, random), random),
        _ => spoil(&mut records, random),
    }
    let run_epoch = random.chance(0.1).then_some(1);
    Frame::from(Append { sequence, count, records: records.into(), run_epoch }).to_bytes().to_vec()
}

/// Changes some bits, and cuts off now and then.
fn spoil(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..random.below(4).min(bytes.len() as u64) {
        let at = random.below(bytes.len() as u64) as usize;
        bytes[at] ^= 1 << random.below(8);
    }
    if random.chance(0.2) {
        bytes.truncate(random.below(bytes.len() as u64 + 1) as usize);
    }
}

/// A frame that is right but for some bits: of those that a customer may want, or any.
fn nearly(aim: &Aim, random: &mut Random) -> Vec<u8> {
    let name = session(aim, random, 50);
    let label = || "p".parse().expect("a label");
    let session = name.parse().expect("a name");
    let frames: [Frame; 5] = [
        Attach { mode: AttachMode::Create, session, incarnation: None, next: None, expire_after: None }.into(),
        OpenProducer { id: random.below(40), name: label(), epoch: 0 }.into(),
        Subscribe {
            id: random.below(9),
            start: Start::Snapshot,
            streams: vec![],
            kinds: vec![],
            window: None,
            folded: true,
        }
        .into(),
        List { prefix: Bytes::new(), after: Bytes::new(), limit: u64::from(u32::MAX) }.into(),
        Update { activity: activity("x") }.into(),
    ];
    let mut bytes = match random.chance(0.3) {
        true => frames[random.below(frames.len() as u64) as usize].to_bytes().to_vec(),
        false => some::<[u8]>(&shown().frames, random).to_vec(),
    };
    spoil(&mut bytes, random);
    bytes
}

fn activity(status: &str) -> Activity {
    Activity { status: status.parse().expect("a label"), progress: None, data: Bytes::new() }
}

async fn bad_frames(way: Way, aim: &Aim, raw: &mut Raw, random: &mut Random, tally: &Tally) -> Option<()> {
    loop {
        let make = |random: &mut Random| match way {
            Way::Fuzz => nearly(aim, random),
            _ => promising(random),
        };
        let mut bytes = make(random);
        for _ in 0..random.below(3) {
            bytes.extend(make(random));
        }
        tally.blow();
        match random.below(20) {
            // On control it is the last one of its connection.
            0 => {
                raw.control.0.write(&mut [bytes.into()]).await.ok()?;
                while let Ok(answer) = timeout(Duration::from_millis(500), raw.control.1.next()).await {
                    tally.hear(&answer);
                    if !matches!(answer, Ok(Some(_))) {
                        break;
                    }
                }
                return None;
            }
            1..4 => {
                let stream = timeout(STUCK, raw.connection.open_uni()).await.ok()?;
                let mut stream = stream.ok()?;
                let written = stream.write(&mut [bytes.into()]).await;
                tally.hear(&written.map(|()| None).map_err(FrameError::Lost));
                stream.finish();
            }
            4..9 => {
                // Batches of a producer that is open; the first that is no batch ends its stream.
                let (mut send, mut frames) =
                    timeout(STUCK, raw.try_open(&attach(&session(aim, random, 50)))).await.ok()??;
                if !matches!(timeout(STUCK, frames.next()).await.ok()?, Ok(Some(Frame::Attached(_)))) {
                    continue;
                }
                let Some(mut batches) = producer(raw, (&mut send, &mut frames)).await else { continue };
                for sequence in 0..4 {
                    let written = batches.write(&mut [bad_batch(way, sequence, random).into()]).await;
                    tally.hear(&written.map(|()| None).map_err(FrameError::Lost));
                }
                hear(&mut frames, tally).await;
                send.finish();
            }
            _ => {
                // Sometimes behind an attach that is right, so that requests are reached.
                let first = if random.chance(0.5) { attach(&session(aim, random, 50)).to_vec() } else { Vec::new() };
                let whole = [first, bytes].concat();
                let (mut send, mut frames) = timeout(STUCK, raw.try_open(&whole)).await.ok()??;
                hear(&mut frames, tally).await;
                if random.chance(0.5) {
                    send.finish();
                } else {
                    send.reset(random.below(1 << 30));
                }
            }
        }
        if let ConnectionError::Closed { code, .. } =
            timeout(Duration::ZERO, raw.connection.closed()).await.unwrap_or(ConnectionError::ClosedHere)
        {
            tally.count(code);
            return None;
        }
    }
}

/// What is answered within a moment.
async fn hear(frames: &mut FrameReader<Recv>, tally: &Tally) {
    for _ in 0..8 {
        let Ok(answer) = timeout(Duration::from_millis(30), frames.next()).await else { return };
        tally.hear(&answer);
        if !matches!(answer, Ok(Some(_))) {
            return;
        }
    }
}

/// What a customer does who wants to be the only one.
async fn attached(way: Way, aim: &Aim, raw: &Raw, random: &mut Random, tally: &Tally) -> Option<()> {
    let (mut send, mut frames) = raw.try_open(&attach(&session(aim, random, 8))).await?;
    if !matches!(timeout(STUCK, frames.next()).await.ok()?, Ok(Some(Frame::Attached(_)))) {
        sleep(Duration::from_millis(200)).await;
        return None;
    }
    match way {
        Way::NeverReads => {
            let mut all: Vec<Bytes> = (0..8).map(subscribe).collect();
            send.write(&mut all).await.ok()?;
            // Something to deliver, from the one who does not read it.
            let mut batches = producer(raw, (&mut send, &mut frames)).await?;
            for sequence in 0..2000 {
                batches.write(&mut [append(sequence, 1000)]).await.ok()?;
                tally.blow();
                // Acknowledgements are not read either: the server ends that.
                sleep(PAUSE).await;
            }
            raw.connection.closed().await;
            return None;
        }
        Way::SlowFrame => {
            let mut stream = raw.connection.open_uni().await.ok()?;
            let mut head = Writer::new();
            head.varint(0x3e);
            head.varint(500_000);
            stream.write(&mut [Frame::from(Produce { producer: 1 }).to_bytes(), head.freeze()]).await.ok()?;
            for _ in 0..500 {
                stream.write(&mut [Bytes::from_static(&[0])]).await.ok()?;
                tally.blow();
                sleep(Duration::from_millis(100)).await;
            }
        }
        Way::Appends | Way::State => {
            let mut batches = producer(raw, (&mut send, &mut frames)).await?;
            let answers = async { while let Ok(Some(_)) = frames.next().await {} };
            let blows = async {
                let mut sequence = 0;
                loop {
                    let batch = match way {
                        Way::Appends => append(sequence, 2000),
                        _ => put(sequence, random),
                    };
                    batches.write(&mut [batch]).await.ok()?;
                    sequence += 1;
                    tally.blow();
                    if sequence % 16 == 0 {
                        sleep(PAUSE).await;
                    }
                }
            };
            return tokio::select! {
                () = answers => None,
                ended = blows => ended,
            };
        }
        Way::Members | Way::Signals => loop {
            let requests: Vec<Frame> = match way {
                Way::Members => vec![
                    Join { name: "m".parse().ok()?, grace: 120_000, activity: activity("here") }.into(),
                    Update { activity: activity(&format!("s{}", random.below(1000))) }.into(),
                ],
                _ => {
                    let id = SignalId(instance(random));
                    let target = Some(Target::Input(MessageId(instance(random))));
                    vec![
                        Signal { id, intent: Intent::Steer, target, lasts: 60_000, text: vec![b'x'; 2000].into() }
                            .into(),
                    ]
                }
            };
            let mut requests: Vec<Bytes> = requests.iter().map(Frame::to_bytes).collect();
            timeout(STUCK, send.write(&mut requests)).await.ok()?.ok()?;
            tally.blow();
            while let Ok(answer) = timeout(Duration::from_millis(5), frames.next()).await {
                answer.ok()??;
            }
        },
        _ => {}
    }
    Some(())
}

async fn producer(raw: &Raw, (send, frames): (&mut Send, &mut FrameReader<Recv>)) -> Option<Send> {
    let open = OpenProducer { id: 1, name: "p".parse().ok()?, epoch: 0 };
    send.write(&mut [Frame::from(open).to_bytes()]).await.ok()?;
    timeout(STUCK, frames.next()).await.ok()?.ok()??;
    let mut batches = raw.connection.open_uni().await.ok()?;
    batches.write(&mut [Frame::from(Produce { producer: 1 }).to_bytes()]).await.ok()?;
    Some(batches)
}

/// A batch that puts some keys that nobody has put before.
fn put(sequence: u64, random: &mut Random) -> Bytes {
    let mut records = Writer::new();
    for _ in 0..8 {
        let key = Key::new(&format!("k{}", random.below(1 << 40))).expect("a key");
        let change = Change::Put { value: vec![b'x'; 500].into(), lasts: 0 };
        let record: Record = StateChange { key, expected: Expected::Any, change }.record(0);
        record.put(&mut records);
    }
    Frame::from(Append { sequence, count: 8, records: records.freeze(), run_epoch: None }).to_bytes()
}

/// Begins handshakes, and lets the server wait for the rest of each: first flights of clients that are never heard of again.
async fn slow_handshake(home: Home, aim: &Aim, tally: &Tally) -> Option<()> {
    let mut silent = Vec::new();
    for _ in 0..20 {
        let flight = first_flight(aim).await?;
        let socket = home.socket().await.ok()?;
        for datagram in flight {
            let _ = socket.send_to(&datagram, aim.addr).await;
        }
        // Whatever it is told, it does not answer.
        silent.push(socket);
        tally.blow();
        sleep(Duration::from_millis(50)).await;
    }
    sleep(STUCK).await;
    Some(())
}

/// What a client sends first.
async fn first_flight(aim: &Aim) -> Option<Vec<Vec<u8>>> {
    let trap = UdpSocket::bind(("127.0.0.1", 0)).await.ok()?;
    let limits = mainstay_client::Config::default().transport_limits();
    let connector = QuicConnector::new(trap.local_addr().ok()?, &aim.trust, &limits, ALPN).ok()?;
    let mut flight = Vec::new();
    let caught = async {
        let (mut datagram, mut patience) = (vec![0; 2048], STUCK);
        while let Ok(Ok(len)) = timeout(patience, trap.recv(&mut datagram)).await {
            flight.push(datagram[..len].to_vec());
            // What belongs to it comes at once.
            patience = Duration::from_millis(5);
        }
    };
    tokio::select! {
        _ = connector.connect(false) => {}
        () = caught => {}
    }
    Some(flight).filter(|flight| !flight.is_empty())
}

/// Datagrams of a random kind.
async fn garbage(home: Home, aim: &Aim, random: &mut Random, tally: &Tally) -> Option<()> {
    let socket = home.socket().await.ok()?;
    for _ in 0..200 {
        let mut datagram: Vec<u8> = (0..20 + random.below(1300)).map(|_| random.below(256) as u8).collect();
        match random.below(4) {
            // A long header: of an unknown version, or of QUIC's, with lengths that lie.
            0 => datagram[0] |= 0x80,
            1 => datagram[..5].copy_from_slice(&[0xc3, 0, 0, 0, 1]),
            // A short header of a connection that nobody has.
            2 => datagram[0] = 0x40 | (datagram[0] & 0x3f),
            _ => {}
        }
        let _ = socket.send_to(&datagram, aim.addr).await;
        tally.blow();
        sleep(Duration::from_millis(1)).await;
    }
    Some(())
}

/// What somebody heard on the way.
#[derive(Debug)]
pub struct Overheard {
    /// All that a client sent over two connections, one after the other.
    pub datagrams: Vec<Vec<u8>>,
    /// The second one began with early data.
    pub is_early: bool,
}

impl Overheard {
    /// Sends all of it again, from another address.
    pub async fn replay(&self, from: Ipv4Addr, to: SocketAddr) -> io::Result<()> {
        let socket = UdpSocket::bind((from, 0)).await?;
        for datagram in &self.datagrams {
            socket.send_to(datagram, to).await?;
        }
        Ok(())
    }
}

/// Listens to a client that visits a server twice, from `from`, and each time says this as soon as it can, each on a stream of its own, control
/// first, and waits for so many frames in answer. `None` if it did not come to that.
pub async fn overhear(to: SocketAddr, trust: &Trust, from: Ipv4Addr, asked: &[(Bytes, usize)]) -> Option<Overheard> {
    let relay = UdpSocket::bind(("127.0.0.1", 0)).await.ok()?;
    let there = UdpSocket::bind((from, 0)).await.ok()?;
    there.connect(to).await.ok()?;
    let here = relay.local_addr().ok()?;
    let mut datagrams = Vec::new();
    let relaying = async {
        let (mut up, mut down, mut client) = (vec![0; 2048], vec![0; 2048], None);
        loop {
            tokio::select! {
                got = relay.recv_from(&mut up) => {
                    let (len, from) = got.ok()?;
                    client = Some(from);
                    if datagrams.len() < MOST_OVERHEARD {
                        datagrams.push(up[..len].to_vec());
                    }
                    let _ = there.send(&up[..len]).await;
                }
                got = there.recv(&mut down) => {
                    // A reset of a socket that is gone is no end.
                    if let (Ok(len), Some(client)) = (got, client) {
                        let _ = relay.send_to(&down[..len], client).await;
                    }
                }
            }
        }
        #[allow(unreachable_code, reason = "says what the block is for `?`")]
        Some(())
    };
    let visits = async {
        let limits = mainstay_client::Config::default().transport_limits();
        let connector = QuicConnector::new(here, trust, &limits, ALPN).ok()?;
        let mut is_early = false;
        for _ in 0..2 {
            let connection = timeout(STUCK, connector.connect(true)).await.ok()?.ok()?;
            is_early = !connection.is_confirmed();
            let mut open = Vec::new();
            for (bytes, answers) in asked {
                let (mut send, recv) = connection.open_bi().await.ok()?;
                send.write(&mut [bytes.clone()]).await.ok()?;
                open.push((send, FrameReader::new(recv, MAX_FRAME), answers));
            }
            // Tickets come before the first of them.
            for (_, frames, answers) in &mut open {
                for _ in 0..**answers {
                    timeout(STUCK, frames.next()).await.ok()?.ok()??;
                }
            }
            connection.close(0, "");
        }
        // The last one's goodbye is heard too.
        sleep(Duration::from_millis(50)).await;
        Some(is_early)
    };
    let is_early = tokio::select! {
        _ = relaying => None,
        is_early = visits => is_early,
    }?;
    Some(Overheard { datagrams, is_early })
}

/// More is not sent again.
const MOST_OVERHEARD: usize = 256;

/// Overhears a connection and the one behind it, which has early data, and sends what was said again and again.
async fn replay(home: Home, aim: &Aim, random: &mut Random, tally: &Tally) -> Option<()> {
    let list = Frame::from(List { prefix: Bytes::new(), after: Bytes::new(), limit: 9 }).to_bytes();
    let mut request = list.to_vec();
    request.extend_from_slice(&attach(&format!("{}/replayed", aim.prefix)));
    let asked = [(hello(token(aim, random).to_owned(), [7; 16]), 1), (request.into(), 1)];
    let overheard = overhear(aim.addr, &aim.trust, home.0, &asked).await?;
    tally.connections.fetch_add(2, Ordering::Relaxed);
    tally.early.fetch_add(u64::from(overheard.is_early), Ordering::Relaxed);
    for _ in 0..50 {
        // From somewhere else each time, as whoever overheard it would.
        overheard.replay(Home::of(random).0, aim.addr).await.ok()?;
        tally.blow();
        sleep(Duration::from_millis(20)).await;
    }
    Some(())
}
