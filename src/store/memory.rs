//! The store's twin in memory: for tests of the pipeline that no real server can be made to play.
//!
//! It keeps the obligations of [`Store`] in the plainest way: one lock, one sorted map, a scan per
//! call. The contract suite runs on it and on Postgres alike.

use super::leases::{Lease, LeaseTable, Member, Standing};
use super::{
    Ask, Census, Delivered, Horizon, Purged, Read, Route, Row, Settlement, Share, Store, StoreError, Trouble,
    Watch, Written,
};
use bytes::Bytes;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// A row with this id, and as little else as a row can have.
pub fn plain_row(id: i64) -> Row {
    Row {
        id,
        message_id: Uuid::from_u128(id as u128),
        route: Arc::new(Route { exchange: String::new(), routing_key: "r".to_owned() }),
        ordering_key: None,
        payload: Bytes::from_static(b"{}"),
        content_type: "".into(),
        headers: "{}".into(),
        created_at_micros: 0,
        attempts: 0,
        lease: Lease::default(),
        defect: None,
    }
}

/// Outbox rows in memory. Clones share the rows.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    rows: BTreeMap<i64, Stored>,
    failures: VecDeque<StoreError>,
    leases: BTreeMap<u32, Owned>,
    replicas: BTreeMap<Uuid, Replica>,
    leases_stalled_until: Option<Instant>,
    /// Whose leases ran out and went to another, and when: a replica's leases end together.
    lapses: HashSet<(Uuid, Instant)>,
    locked: HashSet<i64>,
    rejected: HashSet<i64>,
}

#[derive(Debug)]
struct Owned {
    owner: Option<Uuid>,
    epoch: i64,
    expires_at: Instant,
}

#[derive(Debug)]
struct Replica {
    shards: u32,
    ready: bool,
    joined_at: Instant,
    expires_at: Instant,
}

/// A row with what the relay has written to it.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The row as the writer made it, with its attempts.
    pub row: Row,
    /// Not before.
    pub available_at: Instant,
    /// Delivered when.
    pub delivered_at: Option<Instant>,
    /// Never to be sent.
    pub dead: bool,
    /// Why it was refused last.
    pub last_error: Option<String>,
}

impl Stored {
    /// Neither delivered nor dead.
    pub fn pending(&self) -> bool {
        self.delivered_at.is_none() && !self.dead
    }

    fn refused(&self) -> bool {
        self.pending() && self.row.attempts > 0
    }
}

impl MemoryStore {
    /// Commits a row that is due at once.
    pub fn insert(&self, row: Row) {
        let stored =
            Stored { row, available_at: Instant::now(), delivered_at: None, dead: false, last_error: None };
        self.lock().rows.insert(stored.row.id, stored);
    }

    /// Lets the next call about rows fail with this error, be it a read, a mark or a purge. Several are used up in order.
    pub fn fail_next(&self, error: StoreError) {
        self.lock().failures.push_back(error);
    }

    /// Somebody has locked these rows, and no others.
    pub fn lock_rows(&self, ids: impl IntoIterator<Item = i64>) {
        self.lock().locked = ids.into_iter().collect();
    }

    /// Rejects whatever is written of these rows, and no others, but their death.
    pub fn reject_rows(&self, ids: impl IntoIterator<Item = i64>) {
        self.lock().rejected = ids.into_iter().collect();
    }

    /// Lets every call to the lease table fail for a while.
    pub fn stall_leases(&self, time: Duration) {
        self.lock().leases_stalled_until = Some(Instant::now() + time);
    }

    /// How often a replica's leases ran out and went to another. One that renews its own late keeps them, and its rows.
    pub fn lapses(&self) -> usize {
        self.lock().lapses.len()
    }

    /// All rows as they are now, in id order.
    pub fn rows(&self) -> Vec<Stored> {
        self.lock().rows.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self) -> Result<MutexGuard<'_, Table>, StoreError> {
        let mut table = self.lock();
        match table.failures.pop_front() {
            Some(error) => Err(error),
            None => Ok(table),
        }
    }
}

/// The shard of a row: by key, or by id where there is none.
fn shard_of(row: &Row, shards: u32) -> u32 {
    let mut hasher = DefaultHasher::new();
    match &row.ordering_key {
        Some(key) => key.hash(&mut hasher),
        None => row.id.hash(&mut hasher),
    }
    (hasher.finish() % u64::from(shards)) as u32
}

fn held_back(row: &Row, first_refused: &HashMap<&str, i64>) -> bool {
    let key = row.ordering_key.as_deref();
    key.and_then(|key| first_refused.get(key)).is_some_and(|first| *first < row.id)
}

/// The row as it is read: with its lease; `None` if its shard is not in the share.
fn read_under(row: &Row, share: Share<'_>) -> Option<Row> {
    let lease = share.lease(shard_of(row, share.shards))?;
    Some(Row { lease, ..row.clone() })
}

impl MemoryStore {
    /// Fails by [`stall_leases`](Self::stall_leases) only: scripted failures are for reads and marks.
    fn lease_table(&self) -> Result<MutexGuard<'_, Table>, StoreError> {
        let table = self.lock();
        match table.leases_stalled_until {
            Some(until) if Instant::now() < until => Err(StoreError {
                trouble: Trouble::Outage,
                sentence: "the lease table is stalled".to_owned(),
            }),
            _ => Ok(table),
        }
    }
}

impl Table {
    fn in_force(&self, lease: Lease) -> bool {
        self.leases.get(&lease.shard).is_some_and(|owned| owned.epoch == lease.epoch)
    }

    fn change_under(
        &mut self,
        lease: Lease,
        id: i64,
        message_id: Uuid,
        change: impl FnOnce(&mut Stored),
    ) -> bool {
        self.in_force(lease) && self.change(id, message_id, change)
    }

    fn standing(&self, me: Member, now: Instant) -> Standing {
        let live: Vec<_> = self.replicas.iter().filter(|(_, replica)| replica.expires_at > now).collect();
        let any_ready = live.iter().any(|(_, replica)| replica.ready);
        let mut counted: Vec<_> =
            live.iter().filter(|(_, r)| r.ready || !any_ready).map(|(id, r)| (r.joined_at, **id)).collect();
        counted.sort_unstable();
        let quota = counted.iter().position(|(_, id)| *id == me.replica).map_or(0, |rank| {
            let (count, rank) = (counted.len() as u32, rank as u32);
            me.shards / count + u32::from(rank < me.shards % count)
        });
        let free = |owned: &&Owned| owned.owner.is_none() || owned.expires_at <= now;
        let mine = |owned: &Owned| owned.owner == Some(me.replica) && owned.expires_at > now;
        Standing {
            member: live.iter().any(|(id, _)| **id == me.replica),
            replicas: live.len() as u32,
            other_shards: live.iter().map(|(_, replica)| replica.shards).find(|shards| *shards != me.shards),
            quota,
            free: self.leases.range(..me.shards).map(|(_, owned)| owned).filter(free).count() as u32,
            leases: self
                .leases
                .iter()
                .filter(|(_, owned)| mine(owned))
                .map(|(shard, owned)| Lease { shard: *shard, epoch: owned.epoch })
                .collect(),
        }
    }

    /// The first row of each key that was refused: it holds back those behind it.
    fn first_refused(&self) -> HashMap<&str, i64> {
        let mut first = HashMap::new();
        for stored in self.rows.values().filter(|stored| stored.refused()) {
            if let Some(key) = stored.row.ordering_key.as_deref() {
                first.entry(key).or_insert(stored.row.id);
            }
        }
        first
    }

    /// What a watch would end for.
    fn noticeable(&self, watch: &Watch<'_>, poll: bool) -> Option<i64> {
        let pending = |(id, stored): (&i64, &Stored)| stored.pending().then_some(*id);
        let news = self.rows.iter().rev().find_map(pending).filter(|id| *id > watch.noticed);
        let due = |(id, stored): (&i64, &Stored)| {
            let due = stored.pending()
                && stored.available_at <= Instant::now()
                && watch.ranges.iter().any(|(first, last)| (first..=last).contains(&id))
                && !watch.in_flight.contains(id);
            due.then_some(*id)
        };
        news.or_else(|| self.rows.iter().filter(|_| poll).find_map(due))
    }

    /// True if there was such a row.
    fn change(&mut self, id: i64, message_id: Uuid, change: impl FnOnce(&mut Stored)) -> bool {
        let wanted = |stored: &&mut Stored| stored.pending() && stored.row.message_id == message_id;
        self.rows.get_mut(&id).filter(wanted).map(change).is_some()
    }
}

impl Store for MemoryStore {
    async fn poll(&self, ask: Ask<'_>) -> Result<Read, StoreError> {
        let table = self.call()?;
        let (now, in_flight) = (Instant::now(), ask.in_flight.iter().collect::<HashSet<_>>());
        let first_refused = table.first_refused();
        let wanted = |stored: &&Stored| {
            let row = &stored.row;
            let shard = shard_of(row, ask.share.shards);
            let due = || {
                stored.available_at <= now
                    && !(row.attempts > 0 && ask.parked.contains(&row.route))
                    && !(ask.keep_order && held_back(row, &first_refused))
                    && ask.share.lease(shard).is_some()
            };
            stored.pending()
                && !in_flight.contains(&row.id)
                && ask.ranges.iter().any(|(first, last)| (first..=last).contains(&&row.id))
                && (ask.others.include(row.id, shard) || due())
        };
        let mut read = Read::default();
        let mut bytes = 0;
        for stored in table.rows.values().filter(wanted).take(ask.rows) {
            if ask.others.include(stored.row.id, shard_of(&stored.row, ask.share.shards)) {
                read.passed.push(stored.row.id);
                continue;
            }
            bytes += stored.row.bytes();
            if bytes > ask.bytes && !(ask.room_for_any && read.rows.is_empty()) {
                read.more = true;
                break;
            }
            read.rows.extend(read_under(&stored.row, ask.share));
        }
        read.more |= read.rows.len() + read.passed.len() >= ask.rows;
        Ok(read)
    }

    async fn watch(&self, watch: Watch<'_>) -> Result<Option<i64>, StoreError> {
        let begun = Instant::now();
        let mut poll_at = begun + watch.first_poll;
        loop {
            let now = Instant::now();
            if let Some(id) = self.call()?.noticeable(&watch, now >= poll_at) {
                return Ok(Some(id));
            }
            if now >= poll_at {
                poll_at = now + watch.poll_interval;
            }
            if begun.elapsed() >= watch.lasts {
                return Ok(None);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn probe(
        &self,
        route: &Route,
        in_flight: &[i64],
        keep_order: bool,
        share: Share<'_>,
    ) -> Result<Option<Row>, StoreError> {
        let table = self.call()?;
        let first_refused = table.first_refused();
        let wanted = |stored: &&Stored| {
            stored.refused()
                && *stored.row.route == *route
                && !in_flight.contains(&stored.row.id)
                && !(keep_order && held_back(&stored.row, &first_refused))
                && share.lease(shard_of(&stored.row, share.shards)).is_some()
        };
        let first =
            table.rows.values().filter(wanted).min_by_key(|stored| (stored.available_at, stored.row.id));
        Ok(first.and_then(|stored| read_under(&stored.row, share)))
    }

    async fn release(&self, route: &Route, rows: usize) -> Result<u64, StoreError> {
        let mut table = self.call()?;
        let now = Instant::now();
        let wanted = |stored: &&mut Stored| {
            stored.refused() && stored.available_at > now && *stored.row.route == *route
        };
        let released =
            table.rows.values_mut().filter(wanted).take(rows).map(|stored| stored.available_at = now);
        Ok(released.count() as u64)
    }

    async fn horizon(
        &self,
        last: i64,
        ranges: &[(i64, i64)],
        in_flight: &[i64],
        ids: usize,
    ) -> Result<Horizon, StoreError> {
        let table = self.call()?;
        let listed = |stored: &&Stored| {
            let id = stored.row.id;
            stored.pending()
                && id <= last
                && !in_flight.contains(&id)
                && ranges.iter().any(|(first, end)| (*first..=*end).contains(&id))
        };
        let pending = table.rows.values().filter(listed).take(ids).map(|stored| stored.row.id).collect();
        // Every insert is its own finished transaction here.
        Ok(Horizon { xmin: 1, next_xid: 1, pending })
    }

    async fn long_passed(&self, below: i64, age: Duration) -> Result<Option<i64>, StoreError> {
        let table = self.call()?;
        let long_ago = |stored: &&Stored| stored.delivered_at.is_some_and(|at| at.elapsed() > age);
        Ok(table.rows.range(..below).map(|(_, stored)| stored).rfind(long_ago).map(|stored| stored.row.id))
    }

    async fn settle(&self, settlement: &Settlement, passes_locks: bool) -> Result<Written, StoreError> {
        let mut table = self.call()?;
        let locked: Vec<i64> = settlement.ids().filter(|id| table.locked.contains(id)).collect();
        let failure = |trouble, sentence: &str| Err(StoreError { trouble, sentence: sentence.to_owned() });
        if !locked.is_empty() && !passes_locks {
            return failure(Trouble::Contention, "somebody has locked a row");
        }
        let settlement = &settlement.without(&locked);
        let not_as_dead = Settlement { dead: Vec::new(), ..settlement.clone() };
        if not_as_dead.ids().any(|id| table.rejected.contains(&id)) {
            return failure(Trouble::Rejected, "a trigger rejects a row");
        }
        let now = Instant::now();
        let mut marked = 0;
        for Delivered { id, message_id } in &settlement.delivered {
            marked += u64::from(table.change(*id, *message_id, |stored| stored.delivered_at = Some(now)));
        }
        for waiting in &settlement.waiting {
            table.change_under(waiting.lease, waiting.id, waiting.message_id, |stored| {
                stored.row.attempts = waiting.attempts;
                stored.available_at = now + waiting.wait;
                stored.last_error = Some(waiting.reason.clone());
            });
        }
        for dead in &settlement.dead {
            marked += u64::from(table.change_under(dead.lease, dead.id, dead.message_id, |stored| {
                stored.row.attempts = dead.attempts;
                stored.dead = true;
                stored.last_error = Some(dead.reason.clone());
            }));
        }
        Ok(Written { marked, locked })
    }

    async fn purge(&self, after: i64, rows: usize, retention: Duration) -> Result<Purged, StoreError> {
        let mut table = self.call()?;
        let looked_at: Vec<(i64, Instant)> = table
            .rows
            .range(after.saturating_add(1)..)
            .filter_map(|(id, stored)| Some((*id, stored.delivered_at?)))
            .take(rows)
            .collect();
        let expired = looked_at.iter().filter(|(_, at)| at.elapsed() > retention).map(|(id, _)| *id);
        let expired: Vec<i64> = expired.collect();
        for id in &expired {
            table.rows.remove(id);
        }
        Ok(Purged {
            looked_at: looked_at.len() as u64,
            deleted: expired.len() as u64,
            last_id: looked_at.last().map_or(i64::MAX, |(id, _)| *id),
        })
    }

    async fn census(&self) -> Result<Census, StoreError> {
        let table = self.lock();
        let pending = || table.rows.values().filter(|stored| stored.pending());
        let keys: HashSet<_> = pending()
            .filter(|stored| stored.refused())
            .filter_map(|stored| stored.row.ordering_key.clone())
            .collect();
        Ok(Census {
            took_seconds: 0.0,
            pending: pending().count() as u64,
            oldest_seconds: pending()
                .map(|stored| stored.available_at.elapsed().as_secs_f64())
                .fold(0.0, f64::max),
            dead: table.rows.values().filter(|stored| stored.dead).count() as u64,
            waiting: pending().filter(|stored| stored.refused()).count() as u64,
            blocked_keys: keys.len() as u64,
        })
    }
}

impl LeaseTable for MemoryStore {
    async fn look(&self, member: Member) -> Result<Standing, StoreError> {
        Ok(self.lease_table()?.standing(member, Instant::now()))
    }

    async fn renew(&self, member: Member, drained: &[Lease]) -> Result<Standing, StoreError> {
        let table = &mut *self.lease_table()?;
        let now = Instant::now();
        let expires_at = now + member.lease_time;
        table.replicas.retain(|_, replica| replica.expires_at > now);
        if table.replicas.values().any(|replica| replica.shards != member.shards) {
            return Ok(table.standing(member, now));
        }
        let joined_at = table.replicas.get(&member.replica).map_or(now, |replica| replica.joined_at);
        let replica = Replica { shards: member.shards, ready: member.ready, joined_at, expires_at };
        table.replicas.insert(member.replica, replica);
        for shard in 0..member.shards {
            let unowned = || Owned { owner: None, epoch: 0, expires_at: now };
            let owned = table.leases.entry(shard).or_insert_with(unowned);
            if owned.owner == Some(member.replica) {
                match drained.contains(&Lease { shard, epoch: owned.epoch }) {
                    true => owned.owner = None,
                    false => owned.expires_at = expires_at,
                }
            }
        }
        let Standing { quota, leases, .. } = table.standing(member, now);
        // Leases of more shards than there are now.
        for owned in table.leases.range_mut(member.shards..).map(|(_, owned)| owned) {
            if owned.owner.is_some() && owned.expires_at <= now {
                *owned = Owned { owner: None, epoch: owned.epoch + 1, expires_at: now };
            }
        }
        let free = |owned: &&mut Owned| owned.owner.is_none() || owned.expires_at <= now;
        let part = (quota as usize).saturating_sub(leases.len());
        for owned in table.leases.range_mut(..member.shards).map(|(_, owned)| owned).filter(free).take(part) {
            table.lapses.extend(owned.owner.map(|owner| (owner, owned.expires_at)));
            *owned = Owned { owner: Some(member.replica), epoch: owned.epoch + 1, expires_at };
        }
        Ok(table.standing(member, now))
    }

    async fn leave(&self, member: Member) -> Result<(), StoreError> {
        let mut table = self.lease_table()?;
        table.replicas.remove(&member.replica);
        let mine = |owned: &&mut Owned| owned.owner == Some(member.replica);
        table.leases.values_mut().filter(mine).for_each(|owned| owned.owner = None);
        Ok(())
    }
}
