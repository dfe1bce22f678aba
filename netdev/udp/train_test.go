package udp_test

import (
	"bytes"
	"testing"

	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/zerocopy"
)

// trainSizes are frames of a batch that leaves as three trains: the last of each is shorter.
var trainSizes = []int{5000, 5000, 4500, 6000, 5000, 5000, 100}

// sendTrains sends batches of frames of trainSizes.
func (r *rig) sendTrains(batches int) {
	r.Helper()
	r.sendBatches(batches, trainSizes)
}

// sendBatches sends batches of frames, and expects each of them, whole and in order, at the far end.
func (r *rig) sendBatches(batches int, sizes []int) {
	r.Helper()
	seq := uint32(0)
	for range batches {
		var batch []*zerocopy.Buffer
		for i, n := range sizes {
			f := netdevtest.Frame(n, seq+uint32(i))
			batch = append(batch, r.buffer(f[:14], f[14:]))
		}
		if n := r.q.Send(batch); n != len(batch) {
			r.Fatalf("%d frames of %d were taken", n, len(batch))
		}
		for _, n := range sizes {
			if got := r.far.recv(); !bytes.Equal(got, netdevtest.Frame(n, seq)) {
				r.Fatalf("frame %d of %d bytes: %d bytes arrived, or others", seq, n, len(got))
			}
			seq++
		}
	}
}

// TestTrains: frames of one length to one peer leave as one send, and arrive as what they were.
func TestTrains(t *testing.T) {
	for options, trains := range map[string]uint64{"": 30, ",no-balloon=on": 30, ",gso=off": 0} {
		t.Run("options"+options, func(t *testing.T) {
			r := newRig(t, ring+",zerocopy=on"+options)
			defer r.close()
			r.sendTrains(10)
			if st := r.dev.Stats(); st.Trains != trains {
				t.Errorf("%+v", st)
			}
		})
	}
}

// TestTrainsRefused: where the way out does not take a train, here because the kernel's IP has to cut what it is made of, its frames leave as copies, and those that follow one by one.
func TestTrainsRefused(t *testing.T) {
	r := newRig(t, ring+",zerocopy=on")
	defer r.close()
	r.Run("ip -n " + r.Here + " link set v0 mtu 3000")
	r.sendTrains(1)
	got := map[zerocopy.Outcome]int{}
	for range trainSizes {
		got[r.next(t)]++
	}
	st := r.dev.Stats()
	if got[zerocopy.CopiedFallback] == 0 || got[zerocopy.Dropped] != 0 || st.Trains == 0 || st.InFlight != 0 {
		t.Fatalf("outcomes %v, %+v", got, st)
	}
	r.sendTrains(5)
	for range 5 * len(trainSizes) {
		if o := r.next(t); o == zerocopy.Dropped || o == zerocopy.CopiedFallback {
			t.Fatalf("a frame was %v", o)
		}
	}
	if now := r.dev.Stats(); now.Trains != st.Trains || r.q.Counters().SendDropped != 0 {
		t.Errorf("%+v, before %+v", now, st)
	}
}

// TestNothingOvertakesARefusedTrain: behind a train that is refused come frames of the same flow that the kernel takes. They were handed to it at once with the
// train, and left before its copies.
func TestNothingOvertakesARefusedTrain(t *testing.T) {
	for name, sizes := range map[string][]int{
		"a frame by itself":  {5000, 5000, 6000},
		"frames that grow":   {5000, 5000, 5001, 5002, 5003},
		"one that is copied": {5000, 5000, 100, 6000, 100},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, ring+",zerocopy=on")
			defer r.close()
			r.Run("ip -n " + r.Here + " link set v0 mtu 3000")
			r.sendBatches(3, sizes)
			if st := r.dev.Stats(); st.Trains == 0 {
				t.Errorf("no train was tried: %+v", st)
			}
		})
	}
}
