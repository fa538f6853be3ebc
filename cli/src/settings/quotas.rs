//! Quotas as they are written: a number, a rate, or `"none"`.

use mainstay_server::{PrefixQuotas, Rate, SessionQuotas, SubjectQuotas};
use mainstay_transport::quic::Admission;
use serde::Deserialize as Derived;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error};
use toml::Value;

/// A value, or `"none"` for no limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting<T>(pub(crate) Option<T>);

impl<'de, T: DeserializeOwned> Deserialize<'de> for Setting<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(word) if word == "none" => Ok(Self(None)),
            value => T::deserialize(value).map(|value| Self(Some(value))).map_err(D::Error::custom),
        }
    }
}

/// So many a second, and so many at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Derived)]
#[serde(deny_unknown_fields)]
pub(crate) struct RateSetting {
    per_second: u32,
    burst: u32,
}

type RateOf = Option<Setting<RateSetting>>;
type Count<T> = Option<Setting<T>>;

/// Takes a rate over that was set.
fn rate(name: &str, set: &RateOf, into: &mut Option<Rate>) -> Result<(), String> {
    match set {
        None => {}
        Some(Setting(None)) => *into = None,
        Some(Setting(Some(RateSetting { per_second, burst }))) => {
            let rate = Rate::new(*per_second, *burst);
            *into = Some(rate.ok_or(format!(
                "{name}: per_second and burst are at least 1, and burst at most what comes together in a minute"
            ))?);
        }
    }
    Ok(())
}

fn count<T: Copy>(set: &Count<T>, none: T, into: &mut T) {
    if let Some(Setting(set)) = set {
        *into = set.unwrap_or(none);
    }
}

macro_rules! rates {
    ($section:literal, $from:expr, $into:expr, $($name:ident),+) => {
        $( rate(concat!($section, ".", stringify!($name)), &$from.$name, &mut $into.$name)?; )+
    };
}

#[derive(Debug, Clone, Default, Derived)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct SubjectSettings {
    connections: Count<usize>,
    connects: RateOf,
    appends: RateOf,
    append_bytes: RateOf,
    attaches: RateOf,
    creates: RateOf,
    lookups: RateOf,
    presence: RateOf,
    signals: RateOf,
    requests: RateOf,
    streams: RateOf,
    refusals: RateOf,
}

impl SubjectSettings {
    pub(crate) fn apply(&self, quotas: &mut SubjectQuotas) -> Result<(), String> {
        count(&self.connections, usize::MAX, &mut quotas.connections);
        rates!(
            "limits.subject",
            self,
            quotas,
            connects,
            appends,
            append_bytes,
            attaches,
            creates,
            lookups,
            presence,
            signals,
            requests,
            streams,
            refusals
        );
        Ok(())
    }
}

/// Which handshakes are let in.
#[derive(Debug, Clone, Default, Derived)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct HandshakeSettings {
    at_once: Option<usize>,
    at_once_per_network: Option<usize>,
    retry_from: Option<usize>,
    begun: RateOf,
    begun_per_network: RateOf,
}

/// More than so many at once would be more than a machine can do.
const MOST_HANDSHAKES: usize = 1 << 14;

impl HandshakeSettings {
    pub(crate) fn admission(&self) -> Result<Admission, String> {
        let mut admission = Admission::default();
        for (name, set, into) in [
            ("at_once", self.at_once, &mut admission.handshakes),
            ("at_once_per_network", self.at_once_per_network, &mut admission.per_network),
        ] {
            let Some(set) = set else { continue };
            if !(1..=MOST_HANDSHAKES).contains(&set) {
                return Err(format!("limits.handshakes.{name} is from 1 to {MOST_HANDSHAKES}"));
            }
            *into = set;
        }
        if self.at_once_per_network.is_some_and(|most| most > admission.handshakes) {
            return Err("limits.handshakes.at_once_per_network is at most limits.handshakes.at_once".into());
        }
        admission.per_network = admission.per_network.min(admission.handshakes);
        admission.retry_from = self.retry_from.unwrap_or(admission.retry_from);
        rate("limits.handshakes.begun", &self.begun, &mut admission.rate)?;
        rate("limits.handshakes.begun_per_network", &self.begun_per_network, &mut admission.network_rate)?;
        Ok(admission)
    }
}

#[derive(Debug, Clone, Default, Derived)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct SessionSettings {
    attachments: Count<usize>,
    subscriptions: Count<usize>,
    members: Option<usize>,
    state_keys: Option<usize>,
    state_bytes: Option<usize>,
    appends: RateOf,
    append_bytes: RateOf,
    stored_bytes: Count<u64>,
}

impl SessionSettings {
    pub(crate) fn apply(&self, quotas: &mut SessionQuotas) -> Result<(), String> {
        count(&self.attachments, usize::MAX, &mut quotas.attachments);
        count(&self.subscriptions, usize::MAX, &mut quotas.subscriptions);
        for (name, most) in [("attachments", quotas.attachments), ("subscriptions", quotas.subscriptions)] {
            if most == 0 {
                return Err(format!("limits.session.{name} is too small for anything to be done"));
            }
        }
        let bounds = &mut quotas.bounds;
        for (name, set, into) in [
            ("members", self.members, &mut bounds.members),
            ("state_keys", self.state_keys, &mut bounds.state_keys),
            ("state_bytes", self.state_bytes, &mut bounds.state_bytes),
        ] {
            match set {
                // More than the protocol allows would promise what nobody gets.
                Some(set) if set > *into => return Err(format!("limits.session.{name} is at most {into}")),
                Some(set) => *into = set,
                None => {}
            }
        }
        rates!("limits.session", self, quotas, appends, append_bytes);
        if let Some(Setting(set)) = &self.stored_bytes {
            quotas.stored_bytes = *set;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Derived)]
#[serde(deny_unknown_fields)]
pub(crate) struct PrefixSettings {
    prefix: String,
    #[serde(default)]
    sessions: Count<u64>,
    #[serde(default)]
    stored_bytes: Count<u64>,
    #[serde(default)]
    appends: RateOf,
    #[serde(default)]
    append_bytes: RateOf,
}

impl PrefixSettings {
    pub(crate) fn quotas(&self) -> Result<PrefixQuotas, String> {
        let mut quotas = PrefixQuotas::default();
        quotas.prefix.clone_from(&self.prefix);
        let set = |set: &Count<u64>| set.as_ref().and_then(|Setting(set)| *set);
        (quotas.sessions, quotas.stored_bytes) = (set(&self.sessions), set(&self.stored_bytes));
        rates!("limits.prefixes", self, quotas, appends, append_bytes);
        Ok(quotas)
    }
}
