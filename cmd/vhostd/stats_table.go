package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/vhostd/vhostd/backend"
)

// printReport prints for people. before is an earlier report to make rates from, or nil.
func printReport(w io.Writer, r report, before *report) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, summary(r))
	fmt.Fprintln(t, "QUEUE\tDIRECTION\tSIZE\tSTATE\tFRAMES\tBYTES\tFRAMES/S\tBIT/S\tKICKS\tCALLS\tWAITS\t")
	for i, q := range r.Queues {
		frames, bits := rates(r, before, i)
		fmt.Fprintf(t, "%d\t%s\t%d\t%s\t%d\t%s\t%s\t%s\t%d\t%d\t%d\t\n",
			q.Index, q.Direction, q.Size, state(q), q.Frames, bytesOf(q.Bytes), frames, bits, q.Kicks, q.Calls, q.Waits)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w, "\nFrames from the guest, by what became of their pages:")
	printOutcomes(t, r.Queues)
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w, "\nTrouble:")
	printTrouble(t, r.Queues)
	if err := t.Flush(); err != nil {
		return err
	}
	for _, q := range r.Queues {
		if q.Broken != "" {
			fmt.Fprintf(w, "\nqueue %d stands still: %s\n", q.Index, q.Broken)
		}
	}
	return nil
}

// summary is everything that is not about one queue.
func summary(r report) string {
	var b strings.Builder
	fmt.Fprintf(&b, "vhostd %s, process %d, up %v, --net %s\n", r.Daemon.Version, r.Daemon.PID,
		time.Duration(r.Daemon.UptimeSeconds*float64(time.Second)).Round(time.Second), r.Daemon.Net)
	d := r.Device
	fmt.Fprintf(&b, "device     %s, %s%s, zero-copy: %s\n", strings.TrimSpace(d.Kind+" "+d.Name), count(d.Pairs, "queue pair"), mtu(d.MTU), d.ZeroCopy)
	if r.Connected {
		fmt.Fprintf(&b, "front-end  connected, %s of guest memory in %s\n", bytesOf(r.MemoryBytes), count(r.MemoryRegions, "region"))
		fmt.Fprintf(&b, "features   %s\n", orNone(r.Features))
	} else {
		fmt.Fprintf(&b, "front-end  not connected: waiting on %s\n", r.Daemon.Socket)
	}
	if u := r.User; u != nil {
		fmt.Fprintf(&b, "network    %s (%d so far), %s, %s, %s\n", count(u.Connections, "TCP connection"), u.ConnectionsTotal,
			count(u.UDPFlows, "UDP flow"), count(u.Pings, "ping"), count(u.Leases, "lease"))
		for _, f := range u.Forwards {
			fmt.Fprintf(&b, "forward    %s %s to %s, %d active (%d so far)\n", f.Proto, f.Host, f.Guest, f.Active, f.Total)
		}
	}
	fmt.Fprintf(&b, "so far     %s, faults: %d of front-ends, %d of guests\n", count(int(r.Sessions), "session"), r.FrontEndErrors, r.GuestErrors)
	return b.String()
}

func printOutcomes(w io.Writer, queues []backend.QueueStats) {
	fmt.Fprint(w, "QUEUE\t")
	for _, o := range outcomes {
		fmt.Fprintf(w, "%s\t", strings.ToUpper(strings.ReplaceAll(o, "_", " ")))
	}
	fmt.Fprintln(w, "PENDING\tAT MOST\tLONGEST WAIT\tGIVEN UP\t")
	for _, q := range queues {
		if q.Direction != fromGuest {
			continue
		}
		fmt.Fprintf(w, "%d\t", q.Index)
		for _, o := range outcomes {
			fmt.Fprintf(w, "%d\t", q.Outcomes[o])
		}
		fmt.Fprintf(w, "%d\t%d\t%v\t%d\t\n", q.Pending, q.MaxPending, time.Duration(q.MaxWaitNs), q.GivenUp)
	}
}

func printTrouble(w io.Writer, queues []backend.QueueStats) {
	fmt.Fprintln(w, "QUEUE\tMALFORMED\tINVALID\tTOO BIG\tNO ROOM\tSEND DROPPED\tRECV DROPPED\tNOTIFY ERRORS\t")
	for _, q := range queues {
		fmt.Fprintf(w, "%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t\n",
			q.Index, q.Malformed, q.Invalid, q.TooBig, q.NoRoom, q.SendDropped, q.RecvDropped, q.NotifyErrors)
	}
}

func state(q backend.QueueStats) string {
	switch {
	case q.Broken != "":
		return "broken"
	case !q.Started:
		return "stopped"
	case !q.Enabled:
		return "disabled"
	}
	return "running"
}

// rates are those of queue i since before, "-" if that cannot be told: another daemon, or none before.
func rates(now report, before *report, i int) (frames, bits string) {
	if before == nil || before.Daemon.PID != now.Daemon.PID || i >= len(before.Queues) {
		return "-", "-"
	}
	seconds := now.Daemon.UptimeSeconds - before.Daemon.UptimeSeconds
	a, b := before.Queues[i], now.Queues[i]
	if seconds <= 0 || b.Frames < a.Frames || b.Bytes < a.Bytes {
		return "-", "-"
	}
	return decimal(float64(b.Frames-a.Frames) / seconds), decimal(float64(b.Bytes-a.Bytes) * 8 / seconds)
}

// count writes a number of things.
func count(n int, thing string) string {
	if n != 1 {
		thing += "s"
	}
	return fmt.Sprintf("%d %s", n, thing)
}

// mtu is the part of a sentence that tells a device's MTU, if it has one.
func mtu(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(", MTU %d", n)
}

// decimal writes a rate with a decimal prefix: 1.3M.
func decimal(v float64) string { return scaled(v, 1000, "kMGTPE", "") }

// bytesOf writes a number of bytes with a binary prefix: 1.5GiB.
func bytesOf(n uint64) string { return scaled(float64(n), 1024, "KMGTPE", "iB") }

func scaled(v, base float64, prefixes, unit string) string {
	if v < base {
		return fmt.Sprintf("%.0f%s", v, strings.TrimPrefix(unit, "i"))
	}
	i := -1
	for v >= base && i < len(prefixes)-1 {
		v /= base
		i++
	}
	return fmt.Sprintf("%.1f%c%s", v, prefixes[i], unit)
}

// orNone writes the features that were negotiated.
func orNone(features []string) string {
	if len(features) == 0 {
		return "none yet: the guest's driver has not started"
	}
	return strings.Join(features, " ")
}
