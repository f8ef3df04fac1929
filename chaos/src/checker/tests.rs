//! A checker that cannot fail proves nothing: a small honest run, and for each invariant what breaks it.

use super::*;
use crate::observations::{Exit, Sample, Says, Setting, Span, Stop};

fn row(id: i64, key: &str, seq: i64) -> WrittenRow {
    WrittenRow {
        id,
        message_id: format!("m{id}"),
        key: Some(key.to_owned()),
        seq,
        routing_key: "a.1".to_owned(),
        hash: format!("h{id}"),
        delay_ms: 0,
        poison: false,
        undone: false,
    }
}

fn transaction(tx: u64, rows: Vec<WrittenRow>, outcome: Outcome) -> [WriterLine; 2] {
    let at = tx * 100;
    [WriterLine::Intent { tx, at, kind: Kind::Plain, rows }, WriterLine::Outcome { tx, at: at + 1, outcome }]
}

fn delivery(id: i64) -> Delivered {
    Delivered {
        at: 1_000 + u64::try_from(id).unwrap() * 10,
        connection: 1,
        redelivered: false,
        message_id: format!("m{id}"),
        id: Some(id),
        key: Some(if id == 3 { "y" } else { "x" }.to_owned()),
        routing_key: "a.1".to_owned(),
        hash: format!("h{id}"),
        persistent: true,
        content_type: Some("application/json".to_owned()),
    }
}

fn kept(id: i64) -> TableRow {
    TableRow { id, message_id: format!("m{id}"), delivered: true, dead: false, attempts: 0, last_error: None }
}

fn span(name: &str, windows: u64) -> Span {
    Span {
        id: "F01".to_owned(),
        name: name.to_owned(),
        began: 50,
        ended: 150,
        windows,
        refuses: false,
        database: false,
        broker: false,
        counted_loss: 0,
    }
}

fn sample(at: u64) -> Sample {
    Sample {
        at,
        replicas: 2,
        processes: 2,
        rss_mib: 30,
        descriptors: 20,
        owned: Some(16),
        shards: Some(16),
        connections: Some(8),
        transaction_ms: Some(3),
    }
}

fn says() -> Says {
    Says {
        replica: 1,
        status: "ok".to_owned(),
        pending: Some(0),
        dead: Some(1),
        in_flight: Some(0),
        metric_pending: Some(0),
        metric_dead: Some(1),
        metric_in_flight: Some(0),
    }
}

/// Keys x (rows 1, 2, 4) and y (row 3), row 5 poison, row 6 rolled back, row 7 taken back, row 8 unknown and
/// committed, row 9 unknown and not.
fn honest() -> Evidence {
    let mut written = Vec::new();
    written.extend(transaction(1, vec![row(1, "x", 1), row(2, "x", 2)], Outcome::Committed));
    written.extend(transaction(2, vec![row(3, "y", 1)], Outcome::Committed));
    let undone = WrittenRow { undone: true, ..row(7, "x", 3) };
    written.extend(transaction(3, vec![undone, row(4, "x", 3)], Outcome::Committed));
    written.extend(transaction(4, vec![WrittenRow { poison: true, ..row(5, "x", 4) }], Outcome::Committed));
    written.extend(transaction(5, vec![row(6, "x", 5)], Outcome::Aborted));
    written.extend(transaction(6, vec![row(8, "x", 5)], Outcome::Unknown));
    written.extend(transaction(7, vec![row(9, "x", 6)], Outcome::Unknown));
    let dead = TableRow { delivered: false, dead: true, attempts: 1, ..kept(5) };
    let setting = Setting {
        replicas: 2,
        max_in_flight: 2,
        ordering: "strict".to_owned(),
        grace_ms: 10_000,
        prefetch: 10,
        max_rss_mib: 200,
        max_descriptors: 100,
        max_connections: 6,
    };
    Evidence {
        written,
        witness: [1, 2, 3, 4, 5, 8].map(|id| format!("m{id}")).into(),
        delivered: [1, 3, 2, 4, 8].map(delivery).into(),
        table: [1, 2, 3, 4, 8].map(kept).into_iter().chain([dead]).collect(),
        seen: Observations {
            setting,
            faults: vec![span("without windows", 0)],
            stops: vec![Stop { replica: 1, at: 5_000, took: 300, code: Some(0), disturbed: false }],
            exits: Vec::new(),
            samples: vec![sample(1_000), sample(2_000)],
            calm_from: 3_000,
            drained_at: Some(3_500),
            says: vec![says()],
        },
    }
}

fn broken(evidence: &Evidence) -> Vec<&'static str> {
    let verdicts = judge(evidence).verdicts;
    verdicts.iter().filter(|verdict| verdict.state == State::Broken).map(|verdict| verdict.id).collect()
}

fn with(change: impl FnOnce(&mut Evidence)) -> Evidence {
    let mut evidence = honest();
    change(&mut evidence);
    evidence
}

#[test]
fn an_honest_run_holds() {
    let judgement = judge(&honest());
    for verdict in &judgement.verdicts {
        assert_eq!(verdict.state, State::Held, "{verdict:?}");
    }
    assert!(judgement.all_held());
    assert_eq!(judgement.verdicts.len(), 13);
    let totals = &judgement.totals;
    assert_eq!((totals.committed_rows, totals.aborted_rows), (6, 3));
    assert_eq!((totals.unknown_transactions, totals.unknown_that_committed), (2, 1));
    // The fault ended at 150; row 3 was committed at 201 and came at 1030, row 2 at 101 and came at 1020.
    let recovery = &judgement.recoveries[0];
    assert_eq!((recovery.next_row_after, recovery.caught_up_after), (Some(1_030 - 150), 1_020 - 150));
}

#[test]
fn a_fault_beside_another_one_is_said_to_be_so() {
    // Row 2, committed before the end of the first fault, arrives 870 ms after it.
    let after = |began, ended| {
        let evidence = with(|evidence| evidence.seen.faults.push(Span { began, ended, ..span("next", 0) }));
        judge(&evidence).recoveries[0].disturbed
    };
    assert!(after(400, 900));
    assert!(!after(1_100, 1_200), "it came later");
    assert!(after(60, 140), "it was on meanwhile");
    let before = |ended| {
        let evidence = with(|evidence| {
            evidence.seen.faults[0] = Span { began: 2_000, ended: 2_100, ..evidence.seen.faults[0].clone() };
            evidence.seen.faults.push(Span { began: 100, ended, ..span("before", 0) });
        });
        judge(&evidence).recoveries[0].disturbed
    };
    assert!(before(1_500), "what comes now may be its work");
    assert!(!before(900), "it was over long before");
}

#[test]
fn a_row_for_later_is_no_backlog() {
    let evidence = with(|evidence| {
        if let WriterLine::Intent { rows, .. } = &mut evidence.written[0] {
            rows[1].delay_ms = 500;
        }
    });
    // Row 1 came at 1010.
    assert_eq!(judge(&evidence).recoveries[0].caught_up_after, 1_010 - 150);
}

#[test]
fn l0_a_commit_that_the_database_lost_or_that_no_ledger_knows() {
    assert!(broken(&with(|evidence| assert!(evidence.witness.remove("m1")))).contains(&"L0"));
    assert!(broken(&with(|evidence| assert!(evidence.witness.insert("m6".to_owned())))).contains(&"L0"));
    assert!(
        broken(&with(|evidence| assert!(evidence.witness.insert("stranger".to_owned())))).contains(&"L0")
    );
}

#[test]
fn i1_a_committed_row_is_gone() {
    // Marked and never consumed: a mark before the confirm.
    let marked = with(|evidence| evidence.delivered.retain(|message| message.id != Some(4)));
    assert_eq!(broken(&marked), ["I1", "I9"]);
    // Deleted and never consumed.
    let gone = with(|evidence| {
        evidence.delivered.retain(|message| message.id != Some(4));
        evidence.table.retain(|row| row.id != 4);
    });
    assert_eq!(broken(&gone), ["I1"]);
    let unknown = with(|evidence| {
        evidence.delivered.retain(|message| message.id != Some(8));
        evidence.table.retain(|row| row.id != 8);
    });
    assert_eq!(broken(&unknown), ["I1"]);
    let counted = with(|evidence| {
        evidence.delivered.retain(|message| message.id != Some(4));
        evidence.seen.faults[0].counted_loss = 1;
    });
    assert!(broken(&counted).is_empty());
}

#[test]
fn i2_a_message_that_nobody_committed() {
    // Rolled back, taken back to a savepoint, unknown and not committed.
    for id in [6, 7, 9] {
        let phantom = with(|evidence| evidence.delivered.push(delivery(id)));
        assert!(broken(&phantom).contains(&"I2"), "row {id}");
    }
    let retried_under_a_new_id = with(|evidence| {
        evidence.delivered.push(Delivered { message_id: "other".to_owned(), ..delivery(1) });
    });
    assert_eq!(broken(&retried_under_a_new_id), ["I2"]);
}

#[test]
fn i3_a_message_that_differs_from_its_row() {
    let changes: [fn(&mut Delivered); 6] = [
        |message| message.hash = "other".to_owned(),
        |message| message.id = Some(77),
        |message| message.key = None,
        |message| message.routing_key = "a.2".to_owned(),
        |message| message.persistent = false,
        |message| message.content_type = None,
    ];
    for change in changes {
        assert_eq!(broken(&with(|evidence| change(&mut evidence.delivered[1]))), ["I3"]);
    }
}

#[test]
fn i4_a_first_delivery_that_was_overtaken() {
    let swapped = with(|evidence| evidence.delivered.swap(2, 3));
    assert_eq!(broken(&swapped), ["I4"]);
    // A fault that allows duplicates does not allow this.
    let swapped = with(|evidence| {
        evidence.delivered.swap(2, 3);
        evidence.seen.faults.push(span("relay-killed", 5));
    });
    assert_eq!(broken(&swapped), ["I4"]);
    let unordered = with(|evidence| {
        evidence.delivered.swap(2, 3);
        evidence.seen.setting.ordering = "none".to_owned();
    });
    assert!(broken(&unordered).is_empty());
}

#[test]
fn i4_a_rewind_is_no_inversion_after_a_kill_and_one_without() {
    let rewound = |evidence: &mut Evidence| evidence.delivered.extend([2, 4].map(delivery));
    let killed = with(|evidence| {
        rewound(evidence);
        evidence.seen.faults.push(span("relay-killed", 1));
    });
    assert!(broken(&killed).is_empty());
    assert_eq!(judge(&killed).totals.rewinds, 1);
    assert_eq!(broken(&with(rewound)), ["I4", "I5"]);
}

#[test]
fn i5_more_duplicates_than_the_windows_allow() {
    let repeat = |evidence: &mut Evidence, ids: &[i64]| {
        evidence.delivered.extend(ids.iter().map(|id| delivery(*id)));
        evidence.seen.faults.push(span("relay-killed", 1));
    };
    assert!(broken(&with(|evidence| repeat(evidence, &[4, 8]))).is_empty());
    assert_eq!(broken(&with(|evidence| repeat(evidence, &[2, 4, 8]))), ["I5"]);
    let stopped_in_a_fault = with(|evidence| {
        evidence.delivered.push(delivery(8));
        evidence.seen.stops[0].disturbed = true;
    });
    assert!(broken(&stopped_in_a_fault).is_empty());
}

#[test]
fn i5_only_the_consumers_own_redeliveries_are_excused() {
    let again = |id, connection, redelivered| Delivered { connection, redelivered, ..delivery(id) };
    let redelivered = with(|evidence| evidence.delivered.extend([again(4, 2, true), again(8, 2, true)]));
    assert!(broken(&redelivered).is_empty());
    assert_eq!(judge(&redelivered).totals.redeliveries, 2);
    let cases = [
        // Not marked by the broker.
        vec![again(8, 2, false)],
        // On the same connection.
        vec![again(8, 1, true)],
        // One earlier delivery excuses one.
        vec![again(8, 2, true), again(8, 2, true)],
        // The connection before knew nothing of it.
        vec![again(8, 2, true), again(4, 3, true)],
    ];
    for case in cases {
        let evidence = with(|evidence| evidence.delivered.extend(case.clone()));
        assert!(broken(&evidence).contains(&"I5"), "{case:?}");
    }
    // Too long ago to have been unacknowledged.
    let evidence = with(|evidence| {
        evidence.seen.setting.prefetch = 2;
        evidence.delivered.push(again(2, 2, true));
    });
    assert!(broken(&evidence).contains(&"I5"));
}

#[test]
fn i6_an_attempt_or_a_dead_row_that_no_refusal_explains() {
    let attempt = |evidence: &mut Evidence| evidence.table[0].attempts = 1;
    assert_eq!(broken(&with(attempt)), ["I6"]);
    let refused = with(|evidence| {
        attempt(evidence);
        evidence.seen.faults[0].refuses = true;
    });
    assert!(broken(&refused).is_empty());
    let dead = with(|evidence| {
        evidence.seen.faults[0].refuses = true;
        evidence.table[0].delivered = false;
        evidence.table[0].dead = true;
        evidence.seen.says[0].dead = Some(2);
        evidence.seen.says[0].metric_dead = Some(2);
    });
    assert_eq!(broken(&dead), ["I6"]);
    let poison_delivered = with(|evidence| evidence.delivered.push(delivery(5)));
    assert!(broken(&poison_delivered).contains(&"I6"));
}

#[test]
fn i7_something_stays_pending_or_a_relay_gives_up() {
    let late = with(|evidence| evidence.seen.drained_at = None);
    assert_eq!(broken(&late), ["I7"]);
    let pending = with(|evidence| {
        evidence.table[4].delivered = false;
        evidence.seen.says[0].pending = Some(1);
        evidence.seen.says[0].metric_pending = Some(1);
    });
    assert_eq!(broken(&pending), ["I7"]);
    let exit = with(|evidence| evidence.seen.exits.push(Exit { replica: 1, at: 9, code: Some(1) }));
    assert_eq!(broken(&exit), ["I7"]);
}

#[test]
fn i8_shards_with_two_owners_or_none() {
    let over = |at| Sample { owned: Some(17), ..sample(at) };
    let twice = with(|evidence| evidence.seen.samples = vec![over(1), over(2), sample(3)]);
    assert_eq!(broken(&twice), ["I8"]);
    // Replicas answer one after the other: a shard may have moved between two answers.
    let once = with(|evidence| evidence.seen.samples = vec![over(1), sample(2), over(3), sample(4)]);
    assert!(broken(&once).is_empty());
    let none = with(|evidence| evidence.seen.samples.push(Sample { owned: Some(15), ..sample(9) }));
    assert_eq!(broken(&none), ["I8"]);
}

#[test]
fn i9_a_mark_without_a_message() {
    let early = with(|evidence| {
        evidence.delivered.retain(|message| message.id != Some(3));
        evidence.seen.faults.push(span("relay-killed", 1));
    });
    assert_eq!(broken(&early), ["I1", "I9"]);
}

#[test]
fn i10_resources_beyond_their_bounds() {
    let changes: [fn(&mut Sample); 4] = [
        |sample| sample.rss_mib = 201,
        |sample| sample.descriptors = 101,
        |sample| sample.connections = Some(13),
        |sample| sample.transaction_ms = Some(1_001),
    ];
    for change in changes {
        assert_eq!(broken(&with(|evidence| change(&mut evidence.seen.samples[0]))), ["I10"]);
    }
    let frozen = with(|evidence| {
        evidence.seen.samples[0].transaction_ms = Some(4_000);
        let frozen = Span { database: true, began: 500, ended: 900, ..span("database-frozen", 0) };
        evidence.seen.faults.push(frozen);
    });
    assert!(broken(&frozen).is_empty());
}

#[test]
fn i11_a_replica_that_says_what_is_not_so() {
    let changes: [fn(&mut Says); 7] = [
        |says| says.pending = Some(1),
        |says| says.dead = None,
        |says| says.in_flight = Some(3),
        |says| says.metric_pending = Some(1),
        |says| says.metric_dead = Some(0),
        |says| says.metric_in_flight = None,
        |says| says.status = "unavailable".to_owned(),
    ];
    for change in changes {
        assert_eq!(broken(&with(|evidence| change(&mut evidence.seen.says[0]))), ["I11"]);
    }
}

#[test]
fn i12_a_stop_that_is_late_or_not_clean() {
    let late = with(|evidence| evidence.seen.stops[0].took = 15_001);
    assert_eq!(broken(&late), ["I12"]);
    for code in [Some(1), Some(101), None] {
        assert_eq!(broken(&with(|evidence| evidence.seen.stops[0].code = code)), ["I12"]);
    }
    // The database was away, so marks could not be written: documented.
    let excused = with(|evidence| {
        evidence.seen.stops[0].code = Some(1);
        evidence.seen.stops[0].disturbed = true;
    });
    assert!(broken(&excused).is_empty());
}
