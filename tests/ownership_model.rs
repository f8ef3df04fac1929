//! The protocol by which replicas share the shards, as a model small enough that every order of events is tried: no
//! sleeps, no servers. It says whether the *rules* suffice; that the code follows them is shown by the tests that run
//! two real relays.
//!
//! | here | there |
//! |---|---|
//! | [`Lease`], [`Ownership::renew`] | a row of `outbox_lease`; `src/store/sql/renew_leases.sql`, one transaction under a lock |
//! | `claims` of a step, [`Step::Leave`] | the quota: left to chance, so nothing below rests on how it is computed |
//! | [`Replica::held`], `trust` | `Holdings`: what the last answer listed, and the time until the trust deadline |
//! | [`Ownership::gate`] | `Permit`: asked right before each message is handed to the AMQP client |
//! | [`Replica::rows`] | a row in memory, with the epoch its read was sent under: from that moment until it is settled |
//! | [`State::newest`] | what the broker has seen: the newest epoch that published a row of the shard |
//! | [`State::late`] | a renewal that its sender has given up, still on its way (a link that hangs, a pooler's queue) |
//!
//! Time is counted in ticks, only as what is left of a lease or of trust, because no rule compares two clocks: the offset
//! between them is arbitrary. A replica whose clock lags by `lag` ticks in the time of a lease trusts for that much
//! longer, so this is all of drift that matters; one whose clock is fast trusts for less. A frozen replica needs no
//! state: it is one that takes no step while time goes on. A crash, too, is followed at once by a start under a new
//! identity, for one that is down does what an idle one does. What a dead process had on its way may still own or claim
//! shards for nobody, until it expires; that is left out.
//!
//! Assumed, and not shown:
//!
//! - The gate and the hand-over to the AMQP client are one step. A process that is frozen exactly between them, or with
//!   messages in the buffers of client and socket, sends those when it wakes.
//! - The database loses no transaction that it has answered, also in a failover, and a mark sees the lease as it is.
//! - The database's clock and each replica's monotonic clock run at the same rate within the margin, also while a
//!   replica is frozen, and the database's clock does not jump, also in a failover. (A machine that is suspended as a
//!   whole, its clock with it, breaks this: the last entry of `every_rule_is_needed`.)
//! - Bounds: one row of a shard in memory at a time; one late renewal at a time; a few epochs.

use stateright::{Checker, HasDiscoveries, Model, Path, Property};

/// What can be left out, to see what for it is there.
#[derive(Clone, Copy, Debug)]
struct Rules {
    /// Ticks that a lease lasts in the table.
    lease: u8,
    /// Ticks that trust ends earlier.
    margin: u8,
    /// Ticks that a replica's clock may lose in the time of a lease.
    lag: u8,
    /// Trust has a deadline.
    trust_ends: bool,
    /// The deadline counts from before the renewal is sent, not from its answer.
    trust_from_sending: bool,
    /// The gate compares the epoch of the row with the one held.
    gate_compares_epochs: bool,
    /// A leaving shard is given back when none of its rows is in memory.
    give_back_drained: bool,
    /// What is given back is shard *and* epoch.
    give_back_names_epoch: bool,
    /// A leaving shard never becomes un-leaving.
    leaving_is_final: bool,
    /// Failures are written only if the lease still has the row's epoch.
    failures_compare_epochs: bool,
}

const PROTOCOL: Rules = Rules {
    lease: 2,
    margin: 1,
    lag: 1,
    trust_ends: true,
    trust_from_sending: true,
    gate_compares_epochs: true,
    give_back_drained: true,
    give_back_names_epoch: true,
    leaving_is_final: true,
    failures_compare_epochs: true,
};

const ONE_GATE: &str = "a shard's gate is open in one replica at most";
const EPOCHS_RISE: &str = "nothing is published under an older epoch than has been published";
const OWN_FAILURES: &str = "a failure is written under the current epoch";
const DRAINED: &str = "a shard that is given back has nothing in memory";

struct Ownership<const REPLICAS: usize, const SHARDS: usize> {
    rules: Rules,
    /// How often each shard may change hands.
    epochs: u8,
    /// Replicas may lose the broker, and then give back what is not drained.
    abandons: bool,
    /// Look for what must be possible, instead of what must not.
    watching: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State<const REPLICAS: usize, const SHARDS: usize> {
    leases: [Lease; SHARDS],
    replicas: [Replica<SHARDS>; REPLICAS],
    newest: [u8; SHARDS],
    late: Option<(usize, PerShard<SHARDS>)>,
    breach: Option<&'static str>,
    sight: Option<Sight>,
}

/// An epoch for some of the shards.
type PerShard<const SHARDS: usize> = [Option<u8>; SHARDS];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Lease {
    owner: Owner,
    epoch: u8,
    /// Ticks until it expires.
    left: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Owner {
    Nobody,
    Dead,
    Replica(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Replica<const SHARDS: usize> {
    trust: u8,
    held: [Option<Held>; SHARDS],
    rows: PerShard<SHARDS>,
    renewal: Option<Renewal<SHARDS>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Held {
    epoch: u8,
    leaving: bool,
    /// The gate is shut for it, whatever is in memory.
    closed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Renewal<const SHARDS: usize> {
    /// Ticks since it was sent.
    age: u8,
    progress: Progress<SHARDS>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Progress<const SHARDS: usize> {
    Sent { gives_back: PerShard<SHARDS> },
    Run { answer: PerShard<SHARDS> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    Tick,
    /// The replica of this number does this.
    Step(usize, Step),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    SendRenewal,
    /// The database runs it; `claims` has a bit for each shard that it takes.
    RunRenewal {
        claims: usize,
    },
    TakeAnswer,
    /// The answer, or already the question, is lost or too late.
    GiveUpRenewal,
    RunLateRenewal {
        claims: usize,
    },
    Leave(usize),
    /// The broker cannot be reached: a leaving shard is shut, so that it can be given back undrained.
    Abandon(usize),
    StayAfterAll(usize),
    /// The read is sent.
    Read(usize),
    /// Gate and hand-over, also of a row whose first outcome is unknown.
    Publish(usize),
    Refuse(usize),
    MarkDelivered(usize),
    MarkFailed(usize),
    Crash,
    Stop,
}

/// What must be possible, or the model would prove nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Sight {
    GivenBackDrained,
    GivenBackShut,
    TakenWhenFree,
    TakenAfterCrash,
    TakenFromFrozen,
    WokenAndRefused,
}

impl<const REPLICAS: usize, const SHARDS: usize> Ownership<REPLICAS, SHARDS> {
    /// For how long a renewal that was just sent will be trusted.
    fn whole_trust(&self) -> u8 {
        self.rules.lease - self.rules.margin + self.rules.lag
    }

    fn gate(&self, replica: &Replica<SHARDS>, shard: usize, epoch: u8) -> bool {
        let held = replica.held[shard];
        let fits = |held: Held| !held.closed && (held.epoch == epoch || !self.rules.gate_compares_epochs);
        replica.trust > 0 && held.is_some_and(fits)
    }

    /// It has a row that the gate lets through, or may read one.
    fn may_publish(&self, replica: &Replica<SHARDS>, shard: usize) -> bool {
        let has = replica.rows[shard].is_some_and(|epoch| self.gate(replica, shard, epoch));
        has || replica.trust > 0 && replica.held[shard].is_some_and(|held| !held.leaving)
    }

    fn tick(&self, state: &mut State<REPLICAS, SHARDS>) {
        for lease in &mut state.leases {
            lease.left = lease.left.saturating_sub(1);
        }
        for replica in &mut state.replicas {
            if self.rules.trust_ends {
                replica.trust = replica.trust.saturating_sub(1);
            }
            if let Some(renewal) = &mut replica.renewal {
                renewal.age = self.whole_trust().min(renewal.age + 1);
            }
        }
    }

    /// The transaction. None: `claims` asks for what cannot be had.
    fn renew(
        &self,
        state: &mut State<REPLICAS, SHARDS>,
        number: usize,
        gives_back: PerShard<SHARDS>,
        claims: usize,
    ) -> Option<PerShard<SHARDS>> {
        let me = Owner::Replica(number);
        let mut answer = [None; SHARDS];
        for shard in 0..SHARDS {
            let mut lease = state.leases[shard];
            let given = |epoch| epoch == lease.epoch || !self.rules.give_back_names_epoch;
            if lease.owner == me && gives_back[shard].is_some_and(given) {
                lease = Lease { owner: Owner::Nobody, left: 0, ..lease };
                let Replica { rows, held, .. } = state.replicas[number];
                match rows[shard] {
                    Some(_) if held[shard].is_some_and(|held| held.closed && held.epoch == lease.epoch) => {
                        self.see(state, Sight::GivenBackShut);
                    }
                    Some(_) => state.breach = Some(DRAINED),
                    None => self.see(state, Sight::GivenBackDrained),
                }
            }
            if lease.owner == me {
                lease.left = self.rules.lease;
            }
            if claims & (1 << shard) != 0 {
                if lease.left > 0 || lease.epoch == self.epochs {
                    return None;
                }
                match lease.owner {
                    Owner::Nobody => self.see(state, Sight::TakenWhenFree),
                    Owner::Dead => self.see(state, Sight::TakenAfterCrash),
                    Owner::Replica(_) => self.see(state, Sight::TakenFromFrozen),
                }
                lease = Lease { owner: me, epoch: lease.epoch + 1, left: self.rules.lease };
            }
            answer[shard] = (lease.owner == me).then_some(lease.epoch);
            state.leases[shard] = lease;
        }
        Some(answer)
    }

    fn see(&self, state: &mut State<REPLICAS, SHARDS>, sight: Sight) {
        state.sight = self.watching.then_some(sight);
    }

    /// None: not possible now.
    fn step(&self, state: &mut State<REPLICAS, SHARDS>, number: usize, step: Step) -> Option<()> {
        let before = state.replicas[number];
        let me = &mut state.replicas[number];
        match step {
            Step::SendRenewal => {
                let gives_back = std::array::from_fn(|shard| {
                    let drained = before.rows[shard].is_none() || !self.rules.give_back_drained;
                    let held = before.held[shard]?;
                    (held.leaving && (drained || held.closed)).then_some(held.epoch)
                });
                let renewal = Renewal { age: 0, progress: Progress::Sent { gives_back } };
                if me.renewal.replace(renewal).is_some() {
                    return None;
                }
            }
            Step::RunRenewal { claims } => {
                let Renewal { age, progress: Progress::Sent { gives_back } } = before.renewal? else {
                    return None;
                };
                let answer = self.renew(state, number, gives_back, claims)?;
                state.replicas[number].renewal = Some(Renewal { age, progress: Progress::Run { answer } });
            }
            Step::TakeAnswer => {
                let Renewal { age, progress: Progress::Run { answer } } = before.renewal? else {
                    return None;
                };
                me.held = std::array::from_fn(|shard| {
                    let epoch = answer[shard]?;
                    let same = before.held[shard].filter(|held| held.epoch == epoch);
                    same.or(Some(Held { epoch, leaving: false, closed: false }))
                });
                me.trust = self.whole_trust() - if self.rules.trust_from_sending { age } else { 0 };
                me.renewal = None;
            }
            Step::GiveUpRenewal => {
                me.renewal = None;
                if let Progress::Sent { gives_back } = before.renewal?.progress {
                    if state.late.is_some() {
                        return None;
                    }
                    state.late = Some((number, gives_back));
                }
            }
            Step::RunLateRenewal { claims } => {
                let (_, gives_back) = state.late.take_if(|(sender, _)| *sender == number)?;
                self.renew(state, number, gives_back, claims)?;
            }
            Step::Leave(shard) => {
                let held = before.held[shard].filter(|held| !held.leaving)?;
                me.held[shard] = Some(Held { leaving: true, ..held });
            }
            Step::Abandon(shard) => {
                let held = before.held[shard].filter(|held| self.abandons && held.leaving && !held.closed)?;
                me.held[shard] = Some(Held { closed: true, ..held });
            }
            Step::StayAfterAll(shard) => {
                let held = before.held[shard].filter(|held| held.leaving && !self.rules.leaving_is_final)?;
                me.held[shard] = Some(Held { leaving: false, closed: false, ..held });
            }
            Step::Read(shard) => {
                let held = before.held[shard].filter(|held| !held.leaving)?;
                if me.rows[shard].replace(held.epoch).is_some() || before.trust == 0 {
                    return None;
                }
            }
            Step::Publish(shard) => {
                let epoch = before.rows[shard].filter(|epoch| self.gate(&before, shard, *epoch))?;
                state.breach = (epoch < state.newest[shard]).then_some(EPOCHS_RISE);
                state.newest[shard] = state.newest[shard].max(epoch);
            }
            Step::Refuse(shard) => {
                let epoch = before.rows[shard].filter(|epoch| !self.gate(&before, shard, *epoch))?;
                me.rows[shard] = None;
                if state.leases[shard].epoch > epoch {
                    self.see(state, Sight::WokenAndRefused);
                }
            }
            Step::MarkDelivered(shard) => {
                me.rows[shard].take()?;
            }
            Step::MarkFailed(shard) => {
                let current = me.rows[shard].take()? == state.leases[shard].epoch;
                state.breach = (!current && !self.rules.failures_compare_epochs).then_some(OWN_FAILURES);
            }
            Step::Crash => self.end(state, number, |lease| Lease { owner: Owner::Dead, ..lease }),
            Step::Stop => {
                if before.rows != [None; SHARDS] {
                    return None;
                }
                self.end(state, number, |lease| Lease { owner: Owner::Nobody, left: 0, ..lease });
            }
        }
        Some(())
    }

    /// The process ends, its leases become this, and another begins in its place.
    fn end(&self, state: &mut State<REPLICAS, SHARDS>, number: usize, becomes: fn(Lease) -> Lease) {
        state.replicas[number] = Replica::start();
        state.late.take_if(|(sender, _)| *sender == number);
        for lease in state.leases.iter_mut().filter(|lease| lease.owner == Owner::Replica(number)) {
            *lease = becomes(*lease);
        }
    }
}

impl<const SHARDS: usize> Replica<SHARDS> {
    fn start() -> Self {
        Self { trust: 0, held: [None; SHARDS], rows: [None; SHARDS], renewal: None }
    }
}

impl<const REPLICAS: usize, const SHARDS: usize> Model for Ownership<REPLICAS, SHARDS> {
    type State = State<REPLICAS, SHARDS>;
    type Action = Action;

    fn init_states(&self) -> Vec<Self::State> {
        vec![State {
            leases: [Lease { owner: Owner::Nobody, epoch: 0, left: 0 }; SHARDS],
            replicas: [Replica::start(); REPLICAS],
            newest: [0; SHARDS],
            late: None,
            breach: None,
            sight: None,
        }]
    }

    /// All there are: `step` knows which are possible.
    fn actions(&self, _: &Self::State, actions: &mut Vec<Action>) {
        use Step::*;
        actions.push(Action::Tick);
        for number in 0..REPLICAS {
            let mut add =
                |steps: &[Step]| actions.extend(steps.iter().map(|step| Action::Step(number, *step)));
            add(&[SendRenewal, TakeAnswer, GiveUpRenewal, Crash, Stop]);
            for claims in 0..1 << SHARDS {
                add(&[RunRenewal { claims }, RunLateRenewal { claims }]);
            }
            for s in 0..SHARDS {
                add(&[Leave(s), Abandon(s), StayAfterAll(s), Read(s), Publish(s), Refuse(s)]);
                add(&[MarkDelivered(s), MarkFailed(s)]);
            }
        }
    }

    fn next_state(&self, last: &Self::State, action: Action) -> Option<Self::State> {
        let mut next = State { breach: None, sight: None, ..last.clone() };
        match action {
            Action::Tick => self.tick(&mut next),
            Action::Step(number, step) => self.step(&mut next, number, step)?,
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let (always, sometimes) = (Property::<Self>::always, Property::<Self>::sometimes);
        if self.watching {
            return vec![
                sometimes("hand-over", |_, state| state.sight == Some(Sight::GivenBackDrained)),
                sometimes("hand-over of what is shut", |_, state| state.sight == Some(Sight::GivenBackShut)),
                sometimes("from nobody", |_, state| state.sight == Some(Sight::TakenWhenFree)),
                sometimes("after a crash", |_, state| state.sight == Some(Sight::TakenAfterCrash)),
                sometimes("from a frozen one", |_, state| state.sight == Some(Sight::TakenFromFrozen)),
                sometimes("it wakes too late", |_, state| state.sight == Some(Sight::WokenAndRefused)),
            ];
        }
        vec![
            always(ONE_GATE, |model, state| {
                let open =
                    |shard| state.replicas.iter().filter(move |replica| model.may_publish(replica, shard));
                (0..SHARDS).all(|shard| open(shard).count() <= 1)
            }),
            always(EPOCHS_RISE, |_, state| state.breach != Some(EPOCHS_RISE)),
            always(OWN_FAILURES, |_, state| state.breach != Some(OWN_FAILURES)),
            always(DRAINED, |_, state| state.breach != Some(DRAINED)),
        ]
    }
}

fn holds<const REPLICAS: usize, const SHARDS: usize>(model: Ownership<REPLICAS, SHARDS>) {
    let checked = model.checker().threads(2).spawn_bfs().join();
    println!("{} states, {} different", checked.state_count(), checked.unique_state_count());
    checked.assert_properties();
}

/// `MODEL=large`: larger bounds, for changes of the protocol. Minutes and two gigabytes; best with `--release`.
fn large() -> bool {
    std::env::var("MODEL").is_ok_and(|bounds| bounds == "large")
}

#[test]
fn a_shard_never_has_two_publishers() {
    holds(Ownership::<2, 1> { rules: PROTOCOL, epochs: 3, abandons: false, watching: false });
    if large() {
        let longer = Rules { lease: 3, ..PROTOCOL };
        holds(Ownership::<2, 1> { rules: longer, epochs: 3, abandons: false, watching: false });
        holds(Ownership::<3, 1> { rules: PROTOCOL, epochs: 2, abandons: false, watching: false });
    }
}

#[test]
fn nor_has_one_whose_owner_loses_the_broker() {
    let epochs = if large() { 3 } else { 2 };
    holds(Ownership::<2, 1> { rules: PROTOCOL, epochs, abandons: true, watching: false });
}

#[test]
fn what_should_happen_can_happen() {
    let model = Ownership::<2, 1> { rules: PROTOCOL, epochs: 3, abandons: true, watching: true };
    model.checker().spawn_bfs().join().assert_properties();
}

#[test]
fn every_rule_is_needed() {
    let broken = [
        (ONE_GATE, Rules { trust_ends: false, ..PROTOCOL }),
        (EPOCHS_RISE, Rules { trust_ends: false, ..PROTOCOL }),
        (ONE_GATE, Rules { trust_from_sending: false, ..PROTOCOL }),
        (ONE_GATE, Rules { trust_from_sending: false, lag: 0, ..PROTOCOL }),
        (ONE_GATE, Rules { margin: 0, ..PROTOCOL }),
        (EPOCHS_RISE, Rules { gate_compares_epochs: false, ..PROTOCOL }),
        (DRAINED, Rules { give_back_drained: false, ..PROTOCOL }),
        (ONE_GATE, Rules { give_back_drained: false, ..PROTOCOL }),
        (ONE_GATE, Rules { give_back_names_epoch: false, ..PROTOCOL }),
        (DRAINED, Rules { give_back_names_epoch: false, ..PROTOCOL }),
        (ONE_GATE, Rules { leaving_is_final: false, ..PROTOCOL }),
        (OWN_FAILURES, Rules { failures_compare_epochs: false, ..PROTOCOL }),
        // Not a rule but an assumption: no clock stands still for longer than the margin.
        (ONE_GATE, Rules { lag: PROTOCOL.margin + 1, ..PROTOCOL }),
    ];
    for (promise, rules) in broken {
        let model = Ownership::<2, 1> { rules, epochs: 3, abandons: false, watching: false };
        let until = HasDiscoveries::AnyOf([promise].into());
        let checked = model.checker().finish_when(until).spawn_bfs().join();
        let example = checked.discovery(promise).map(Path::into_actions);
        println!("{rules:?}\n  against: {promise}\n  {example:?}");
        assert!(example.is_some(), "{promise:?} holds with {rules:?}");
    }
}
