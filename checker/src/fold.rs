//! What records add up to: written anew from what the specification says, in the plainest way.

use std::collections::BTreeMap;

use crate::history::Record;

/// How a run stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The seq of its newest start.
    pub epoch: u64,
    /// Who holds it; `None` once it is lost.
    pub holder: Option<String>,
    /// Who held it last.
    pub newest: String,
    /// It was begun for an input.
    pub for_input: bool,
    /// It has ended.
    pub over: bool,
}

/// The fold of the records from the first one on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fold {
    /// Value and revision of each key.
    pub state: BTreeMap<String, (String, u64)>,
    /// Generation of each member, by author.
    pub members: BTreeMap<String, u64>,
    /// Text of each message, by id.
    pub messages: BTreeMap<String, String>,
    /// Runs, by id.
    pub runs: BTreeMap<String, Run>,
}

impl Fold {
    /// Adds the next record.
    pub fn add(&mut self, record: &Record) {
        let text = || record.data.clone().unwrap_or_default();
        match (record.kind.as_str(), &record.key, &record.message, &record.run) {
            ("state.put", Some(key), ..) => {
                self.state.insert(key.clone(), (record.value.clone().unwrap_or_default(), record.seq));
            }
            ("state.deleted" | "state.expired", Some(key), ..) => drop(self.state.remove(key)),
            ("presence.joined", ..) => drop(self.members.insert(record.author.clone(), record.seq)),
            ("presence.left", ..) => {
                if let Some(member) = &record.member {
                    self.members.remove(member);
                }
            }
            ("message.start", _, Some(id), _) => drop(self.messages.insert(id.clone(), String::new())),
            ("message.append", _, Some(id), _) => self.messages.entry(id.clone()).or_default().push_str(&text()),
            ("message.replace", _, Some(id), _) => drop(self.messages.insert(id.clone(), text())),
            ("run.start", _, _, Some(id)) => {
                let (epoch, newest) = (record.seq, record.author.clone());
                // Whoever takes it over does not say so again.
                let for_input = record.input.is_some() || self.runs.get(id).is_some_and(|run| run.for_input);
                let run = Run { epoch, holder: Some(newest.clone()), newest, for_input, over: false };
                self.runs.insert(id.clone(), run);
            }
            ("run.lost", _, _, Some(id)) => {
                if let Some(run) = self.runs.get_mut(id) {
                    run.holder = None;
                }
            }
            ("run.end", _, _, Some(id)) => {
                if let Some(run) = self.runs.get_mut(id) {
                    run.over = true;
                }
            }
            _ => {}
        }
    }
}
